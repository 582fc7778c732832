"""The loop around: step, state, checkpoints, distribution, metrics, validation."""
