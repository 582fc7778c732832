"""Training: the loop, its state, checkpoints, processes, metrics and validation."""
