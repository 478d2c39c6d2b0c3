"""The state of a server on disk: SQLite rows, uploaded files, keys."""
