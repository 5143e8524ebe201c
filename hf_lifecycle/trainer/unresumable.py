"""What Trainer saves and cannot load again, found while there is time to act."""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch

from hf_lifecycle.saving.carrying import without_tensors

__all__ = ["adapters_trainer_cannot_load", "unloadable"]

_EXAMPLES = 3


def unloadable(file: str, state: Any) -> str | None:
    """Why Trainer, which loads with ``weights_only=True``, will not load this state from ``file``; None if it will."""
    content = io.BytesIO()
    try:
        torch.save(without_tensors(state), content)
        content.seek(0)
        names = torch.serialization.get_unsafe_globals_in_checkpoint(content)
    except (AttributeError, pickle.PickleError, ValueError, TypeError, RuntimeError):  # it cannot be told this way
        return None
    if not names:
        return None
    return (
        f"{file} names {', '.join(sorted(names)[:_EXAMPLES])}, which no resume will load, Trainer's own neither: "
        "keep plain numbers and tensors in its state"
    )


def adapters_trainer_cannot_load(model: torch.nn.Module) -> list[str]:
    """A sentence for each adapter of PEFT whose file does not fit the model that it was saved from."""
    return [
        f"adapter {name!r}: the file of a prefix with a projection does not fit the model it was saved from, so "
        "Trainer's resume fails: set prefix_projection=False"
        for name, config in (getattr(model, "peft_config", None) or {}).items()
        if getattr(config, "prefix_projection", False)
    ]
