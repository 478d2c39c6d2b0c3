"""Chat templates: conversations rendered as token ids with exact loss masks."""
