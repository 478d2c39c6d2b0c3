"""Room 1: data. Readers, row shapes, chat rendering with exact masks, checks, preview and flat batches."""
