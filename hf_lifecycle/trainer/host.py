"""What no event of Trainer's brings, read from the frames of the Trainer that raises the event.

A callback is given neither the trainer, nor the path that ``train()`` resumes from, nor the loss since the last log
row. Names are looked up in Trainer's own methods only; where a version has them no more, the answer is None, and what
depends on it is checked or said by the caller.
"""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any

import torch

__all__ = ["callbacks_like", "path_given_to_train", "unlogged_loss"]

_LOOP = "_inner_training_loop"


def _locals_of(*methods: str) -> dict[str, Any]:
    """The local variables of the innermost frame that runs one of ``methods``."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in methods:
            return dict(frame.f_locals)
        frame = frame.f_back
    return {}


def callbacks_like(callback: object) -> int:
    """How many callbacks of the trainer are of the class of ``callback``; 1 where that cannot be seen."""
    handler = getattr(_locals_of(_LOOP).get("self"), "callback_handler", None)
    return sum(isinstance(other, type(callback)) for other in getattr(handler, "callbacks", [callback]))


def path_given_to_train() -> Path | None:
    """The directory that ``train()`` resumes from."""
    path = _locals_of(_LOOP).get("resume_from_checkpoint")
    return Path(path) if isinstance(path, (str, PathLike)) else None


def unlogged_loss() -> torch.Tensor | None:
    """The tensor in which Trainer sums the loss since the last log row; to be changed in place only."""
    names = _locals_of("_maybe_log_save_evaluate", _LOOP)
    loss = names.get("tr_loss", getattr(names.get("self"), "_tr_loss", None))
    return loss if isinstance(loss, torch.Tensor) else None
