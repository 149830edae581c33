"""Who owns which examples, and how they are cut into parts."""
