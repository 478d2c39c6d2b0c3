"""Chat messages, templates and rendering with exact masks."""
