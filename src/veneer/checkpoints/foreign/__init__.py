"""Adapter files of other programs: mlx-lm, LitGPT and GGUF."""
