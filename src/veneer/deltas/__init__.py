"""Deltas: what an adapter changes in each weight, and the linear algebra on it that composing, merging and analysis share."""
