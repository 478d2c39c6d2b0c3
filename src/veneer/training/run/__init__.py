"""A run on disk: its folder, checkpoints, console output and results."""
