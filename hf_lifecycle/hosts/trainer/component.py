"""One concern of the callback, with a state of its own: it hears Trainer's events, each as one value.

One of them tells the others that a step is to come: after the epoch has begun, and ahead of every ``on_step_begin``. No
event of Trainer's falls there: callbacks before ours have heard of the step by the time that we hear of it. The batches
of a step are fetched there; where this Trainer has no method for that, the parts are told at ``on_step_begin``, which
is late for what such a callback does there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.hosts.trainer.host import before_method
from hf_lifecycle.hosts.trainer.intercept import FETCH

__all__ = ["Component", "Event", "StepEvents"]


class Event(NamedTuple):
    """What Trainer gives with an event; ``more``: what it gives by name, such as ``model`` or ``metrics``."""

    args: TrainingArguments
    state: TrainerState
    control: TrainerControl
    more: Mapping[str, Any]


class Component:
    """A part of :class:`~hf_lifecycle.hosts.trainer.callback.LifecycleCallback`, made anew for each ``train()``.

    It hears the events for which it has a method of Trainer's name for them, ``on_step_end(event)`` for one, in the
    order that the callback writes down. ``state_dict()`` is what it has to find again after a break;
    ``load_state_dict()`` runs before its ``on_train_begin``.
    """

    key: ClassVar[str]

    def state_dict(self) -> dict[str, Any]:
        """What happened, as plain values and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.check_keys(state)

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        """The batches of a step are about to be fetched: ahead of every callback's ``on_step_begin``."""

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        """A save begins, on every rank: its state is that of now. It may be one that no event announced."""

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        """That save is made, captured, or failed."""

    def release(self, args: TrainingArguments) -> None:
        """Give back what was borrowed from Trainer: called at the end, and by the next run where this one raised."""

    def check_keys(self, state: Mapping[str, Any], *keys: str) -> None:
        """Raise :class:`StateMismatch` unless ``state`` has exactly ``keys``."""
        missing, unknown = [k for k in keys if k not in state], [k for k in state if k not in keys]
        if missing or unknown:
            raise StateMismatch(self.key, missing, unknown)


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
