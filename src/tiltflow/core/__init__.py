"""What needs no model: files, ranks, counted randomness, checkpoints, the log."""
