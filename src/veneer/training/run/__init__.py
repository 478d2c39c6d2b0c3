"""A run on disk: folder, checkpoints, console output and results."""
