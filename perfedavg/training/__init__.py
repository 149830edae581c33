"""What a client does on its own data: the hot path."""
