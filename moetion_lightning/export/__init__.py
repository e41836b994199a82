"""From restore points to ordinary checkpoints, without the training script."""
