"""Contestants' processes: one file per way to take a training step, behind one small protocol."""
