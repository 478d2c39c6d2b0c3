"""One run on many machines: workers of a Ray cluster train parts of its jobs."""
