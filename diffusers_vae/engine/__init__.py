"""The training engine: run folders, checkpoints and the training loop."""
