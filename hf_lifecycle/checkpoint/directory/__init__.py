"""What lies in a directory of checkpoints, what of it is intact, and how it changes."""
