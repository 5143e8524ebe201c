"""Other code at a save: what may read the checkpoint finds it.

A checkpoint has its name when the save returns, and a save in the background is waited for where anybody may look
before it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerCallback

from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.trainer.own_save import overrides_that_run_on

__all__ = ["readers"]

# The reporters of transformers that hear on_save, and when they look at the checkpoint.
_READS: Mapping[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda one: getattr(getattr(one, "_log_model", None), "value", None) == "checkpoint",
    "MLflowCallback": lambda one: bool(getattr(one, "_log_artifacts", False)),
    "NeptuneCallback": lambda one: bool(getattr(one, "_should_upload_checkpoint", False)),
    "ClearMLCallback": lambda one: bool(getattr(one, "_log_model", False)),
    "FlyteCallback": lambda one: bool(getattr(one, "sync_checkpoints", False)),
    "DVCLiveCallback": lambda one: getattr(one, "_log_model", None) == "all",
    "TrackioCallback": lambda _: False,
    "SwanLabCallback": lambda _: False,
}


def _reads(callback: Any) -> bool | None:
    """Whether a reporter of transformers reads the checkpoint; None for any other callback."""
    names = (kind.__name__ for kind in type(callback).__mro__)
    return next((_READS[name](callback) for name in names if name in _READS), None)


def readers(trainer: Any, part: Any) -> list[str]:
    """Whose code may look at the checkpoint when Trainer has saved it, beside the callback that ``part`` is of."""
    others = (one for one in trainer.callback_handler.callbacks if part not in attributes_of(one).get("_parts", ()))
    hearing = (one for one in others if getattr(one.on_save, "__func__", None) is not TrainerCallback.on_save)
    found = [f"{type(one).__name__}.on_save" for one in hearing if _reads(one) is not False]
    return found + [f"{name}._save_checkpoint" for name in overrides_that_run_on(trainer)]
