"""The engine: many requests under many adapters in one batch."""
