"""Other code at a save: what may read the checkpoint finds it.

A checkpoint has its name when the save returns, and a save in the background is waited for where anybody may look
before it is written.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from hf_lifecycle.hosts.trainer.after_event import LastToHear
from hf_lifecycle.hosts.trainer.intercept import SAVE, reads_checkpoint
from hf_lifecycle.hosts.trainer.saves.interception import overrides_that_run_on
from hf_lifecycle.state.reachable import attributes_of

__all__ = ["readers"]


def readers(trainer: Any, part: Any) -> list[str]:
    """Whose code may look at the checkpoint when Trainer has saved it, beside the callback that ``part`` is of."""
    every = (one for one in trainer.callback_handler.callbacks if type(one) is not LastToHear)
    others = (one for one in every if part not in attributes_of(one).get("_parts", ()))
    hearing = (one for one in others if getattr(one.on_save, "__func__", None) is not TrainerCallback.on_save)
    found = [f"{type(one).__name__}.on_save" for one in hearing if reads_checkpoint(one) is not False]
    return found + [f"{name}.{SAVE}" for name in overrides_that_run_on(trainer)]
