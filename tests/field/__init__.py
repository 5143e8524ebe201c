"""Situations of people who train with code that we do not know, a kind each: what happens is right, or is told before."""
