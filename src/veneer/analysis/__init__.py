"""Spectra, subspaces and reports of adapters and their parents."""
