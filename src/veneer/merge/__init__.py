"""Folding adapters into plain weights, with the rounding error reported."""
