"""Copies of live tensors as they are at one moment, made while training continues."""
