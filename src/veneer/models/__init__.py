"""Room 1: base models. Loading, precision, fingerprints, flat runs, and tiny models for tests."""
