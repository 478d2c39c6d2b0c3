"""Deltas of adapters, and the linear algebra on them that composing, merging and analysis share."""
