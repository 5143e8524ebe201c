"""Tells the other parts that a step is to come: after the epoch has begun, and ahead of every ``on_step_begin``.

No event of Trainer's falls there: callbacks before ours have heard of the step by the time that we hear of it. The
batches of a step are fetched there; where this Trainer has no method for that, the parts are told at
``on_step_begin``, which is late for what such a callback does there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import before_method
from hf_lifecycle.hosts.trainer.intercept import FETCH

__all__ = ["StepEvents"]


class StepEvents(Component):
    """Calls ``before_step`` of ``parts``."""

    key = "steps_to_come"

    def __init__(self, parts: Sequence[Component]) -> None:
        self._parts = parts
        self._stop_watching: Callable[[], None] | None = None

    def on_train_begin(self, event: Event) -> None:
        self._stop_watching = before_method(FETCH, partial(self._tell, event.args, event.state))

    def on_step_begin(self, event: Event) -> None:
        if self._stop_watching is None:
            self._tell(event.args, event.state)

    def _tell(self, args: TrainingArguments, state: TrainerState) -> None:
        for part in self._parts:
            part.before_step(args, state)

    def release(self, args: TrainingArguments) -> None:
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
