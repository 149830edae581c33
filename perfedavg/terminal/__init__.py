"""What a person reads while a run goes on, and how a process begins and ends."""
