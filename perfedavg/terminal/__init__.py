"""What a person reads while a run goes on and when it ends."""
