"""The engine alone, without a host."""
