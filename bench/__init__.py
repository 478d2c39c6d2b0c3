"""Measurements beside other libraries, in one run, as ratios with their spread. Nothing here is part of the package."""
