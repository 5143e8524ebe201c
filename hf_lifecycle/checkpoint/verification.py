"""Verifies a checkpoint from Python: an address that programs import from, and that stays.

What is verified, and how, is :mod:`hf_lifecycle.checkpoint.directory.verification`'s.
"""

from __future__ import annotations

from hf_lifecycle.checkpoint.directory.verification import verify

__all__ = ["verify"]
