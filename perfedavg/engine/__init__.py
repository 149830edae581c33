"""The experiment: rounds, who takes part in them, who does their work, and scores."""
