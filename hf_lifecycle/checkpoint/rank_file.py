"""What each process adds to a checkpoint: ``lifecycle/rank-RRRRR.safetensors``, a state file of its host's kind."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["KINDS", "LOOP", "TRAINER", "rank_file", "ranks_in"]

TRAINER = "trainer"  # the kind of those saved under Trainer
LOOP = "loop"  # the kind of those saved in an Accelerate loop
KINDS = (TRAINER, LOOP)

_NAME = re.compile(r"rank-(\d{5})\.safetensors")


def rank_file(checkpoint: Path, rank: int) -> Path:
    """The file with what ``rank`` added to a checkpoint."""
    return checkpoint / "lifecycle" / f"rank-{rank:05d}.safetensors"


def ranks_in(checkpoint: Path) -> list[int]:
    """The ranks that added to a checkpoint."""
    names = (_NAME.fullmatch(path.name) for path in (checkpoint / "lifecycle").glob("rank-*"))
    return sorted(int(name[1]) for name in names if name is not None)
