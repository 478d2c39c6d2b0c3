"""Benchmarks against other libraries: ratios with their spread, measured in one run. Not part of the package."""
