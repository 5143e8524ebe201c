"""Loops of one's own on accelerate."""
