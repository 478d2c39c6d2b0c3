"""Base models: loading, precision, fingerprints and flat runs."""
