"""Acts that run when an event of Trainer's has been heard by all callbacks, those after ours too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

__all__ = ["LastToHear", "after_other_callbacks", "hears"]


def after_other_callbacks(trainer: Any, event: str, act: Callable[[], object]) -> Callable[[], None]:
    """Let ``act()`` run when the ``event`` that is being raised, or the next one, has been heard by all callbacks.

    Returns what calls that off.
    """
    callbacks = trainer.callback_handler.callbacks
    last = callbacks[-1] if callbacks else None
    # Invariant: one for all who ask: where one of two leaves a list that is gone through, the other is skipped.
    if not isinstance(last, LastToHear) or last.event != event:
        last = LastToHear(event, callbacks)
        callbacks.append(last)  # a list that is gone through grows
    return last.add(act)


def hears(callback: Any, event: str) -> bool:
    """Whether a callback has a method of its own for this event."""
    return getattr(getattr(callback, event), "__func__", None) is not getattr(TrainerCallback, event)


class LastToHear(TrainerCallback):
    """Hears an event after all other callbacks, once."""

    def __init__(self, event: str, callbacks: list[TrainerCallback]) -> None:
        self.event = event
        self._callbacks = callbacks
        self._acts: list[Callable[[], object]] = []
        setattr(self, event, self._meet)

    def __reduce__(self) -> Any:
        return TrainerCallback, ()  # a copy has nothing to do

    def add(self, act: Callable[[], object]) -> Callable[[], None]:
        """Let ``act`` run then. Returns what calls that off."""
        self._acts.append(act)

        def call_off() -> None:
            if act in self._acts:
                self._acts.remove(act)
            if not self._acts:
                self._leave()

        return call_off

    def _leave(self) -> None:
        self._callbacks[:] = [one for one in self._callbacks if one is not self]  # a user's may raise when compared

    def _meet(self, *_: Any, **__: Any) -> None:
        self._leave()
        acts, self._acts = self._acts, []
        for act in acts:
            act()
