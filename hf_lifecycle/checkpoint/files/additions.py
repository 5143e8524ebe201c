"""What this package adds to a checkpoint: a state file of each rank, and a mark in what the host saves itself.

``lifecycle/rank-RRRRR.safetensors`` is a state file of its host's kind. By the mark, ``trainer_state.json`` and those
files know each other. It lies in what Trainer saves of its ``TrainerControl``, which every Trainer has, and of which it
reads the keys that it knows. Under a name of its own, as if it were a callback's state, Trainer would warn that such a
callback is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["HOLDER", "KINDS", "LOOP", "TRAINER", "mark_in", "marked", "rank_file", "without_mark"]

TRAINER = "trainer"  # the kind of those saved under Trainer
LOOP = "loop"  # the kind of those saved in an Accelerate loop
KINDS = (TRAINER, LOOP)

HOLDER = "TrainerControl"
_KEY = "hf_lifecycle"


def rank_file(checkpoint: Path, rank: int) -> Path:
    """The file with what ``rank`` added to a checkpoint."""
    return checkpoint / "lifecycle" / f"rank-{rank:05d}.safetensors"


def mark_in(callbacks: Any) -> Mapping[str, Any] | None:
    """The mark in ``stateful_callbacks``, if there is one."""
    holder = callbacks.get(HOLDER) if isinstance(callbacks, dict) else None
    mark = holder.get(_KEY) if isinstance(holder, dict) else None
    return mark if isinstance(mark, dict) else None


def marked(control: Mapping[str, Any], mark: Mapping[str, Any]) -> dict[str, Any]:
    """What is saved of a ``TrainerControl``, with the mark."""
    return {**control, _KEY: dict(mark)}


def without_mark(callbacks: Any) -> Any:
    """``stateful_callbacks`` without the mark."""
    if mark_in(callbacks) is None:
        return callbacks
    return {**callbacks, HOLDER: {key: value for key, value in callbacks[HOLDER].items() if key != _KEY}}
