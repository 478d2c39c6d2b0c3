"""What runs inside a contestant's own process: one file for each way of taking a training step, behind one small protocol."""
