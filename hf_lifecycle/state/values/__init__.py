"""Plain values that a user's code changes: found, carried without code, and restored."""
