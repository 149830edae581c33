"""What stays of a run: its folder, checkpoints, model and results, and the reader of all of them."""
