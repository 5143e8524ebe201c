"""The mark by which ``trainer_state.json`` and the state of this package in the same checkpoint know each other.

It lies in what Trainer saves of its ``TrainerControl``, which every Trainer has, and of which it reads the keys that it
knows. Under a name of its own, as if it were a callback's state, Trainer would warn of a callback that is not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["HOLDER", "mark_in", "marked", "without_mark"]

HOLDER = "TrainerControl"
_KEY = "hf_lifecycle"


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
