"""Tests of the second place of checkpoints."""
