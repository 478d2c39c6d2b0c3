"""Readers of row files, and the shapes that rows may have."""
