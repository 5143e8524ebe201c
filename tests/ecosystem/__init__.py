"""Exact resume with the libraries that people train with, beyond the cases of the matrix."""
