"""What the matrix compares runs with: the package's own, which people use for their scripts."""

from __future__ import annotations

from hf_lifecycle.testing.outcome import KINDS, Outcome, compare, digest, flatten, kind_of
from hf_lifecycle.testing.trainers import Recorder

__all__ = ["KINDS", "Outcome", "Recorder", "compare", "digest", "flatten", "kind_of"]
