"""Data: readers, row shapes, chat rendering with exact masks, checks, preview and flat batches."""
