"""Files of rows: readers for each format, and the shapes that rows may have."""
