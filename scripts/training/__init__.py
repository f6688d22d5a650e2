"""What the scripts train: models, data, strategies, checkpoints and logs (a program, not part of the library)."""
