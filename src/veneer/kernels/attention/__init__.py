"""Attention over the segments of a flat batch."""
