"""What stays of a run: its folder, checkpoints, model, curves and pictures."""
