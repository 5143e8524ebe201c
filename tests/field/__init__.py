"""Situations of people who train with code that we do not know, one test a kind: it is right, or it is told before."""
