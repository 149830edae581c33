"""The search for a method's settings: spaces, trials on validation clients, the study that keeps them, the choice."""
