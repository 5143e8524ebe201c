"""What steers a training beside the optimizer's steps: who decides by evaluations, who reads which arguments.

Told from the scheduler, from the arguments, and from what the code of callbacks and of the trainer's class stores and
reads. Not seen: a callback that acts on a metric otherwise than by stopping.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_lifecycle.hosts.trainer.resume.arguments import Steering
from hf_lifecycle.hosts.trainer.resume.schedule import takes_metrics
from hf_lifecycle.hosts.trainer.stopping import Stopping
from hf_lifecycle.state.values.functions import is_of_user, names_read_by, names_stored_by

__all__ = ["readers_of", "steering_of"]

_STOPS = frozenset({"should_epoch_stop", "should_training_stop"})


def steering_of(
    args: TrainingArguments, trainer: Any, scheduler: Any, stopping: Stopping, *, streamed: bool
) -> Steering:
    """What the training of ``trainer`` depends on. ``streamed``: its data is a stream."""
    best = args.load_best_model_at_end or stopping.restores_best
    decided = best or stopping.decision is not None or takes_metrics(scheduler)
    return Steering(decided or any(map(_stops_by_evaluations, _callbacks(trainer))), best, streamed)


def readers_of(trainer: Any, names: frozenset[str]) -> list[str]:
    """The user's classes, of the trainer and its callbacks, whose code reads an attribute of one of these names."""
    kinds = {kind: None for one in (trainer, *_callbacks(trainer)) for kind in type(one).__mro__}
    return [kind.__qualname__ for kind in kinds if is_of_user(kind) and names_read_by(kind) & names]


def _callbacks(trainer: Any) -> list[Any]:
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", []))


def _stops_by_evaluations(callback: TrainerCallback) -> bool:
    if type(callback).on_evaluate is TrainerCallback.on_evaluate:
        return False
    return any(names_stored_by(kind) & _STOPS for kind in type(callback).__mro__)
