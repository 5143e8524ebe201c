"""The random number generators of this process, read and written."""
