"""Bases with quantized weights: which checkpoints can be read, and reading them."""
