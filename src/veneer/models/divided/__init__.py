"""Bases and batches that several processes divide."""
