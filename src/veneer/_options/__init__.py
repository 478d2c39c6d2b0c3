"""Behind ``veneer.config``: the machinery of options and the options themselves. Import from there."""
