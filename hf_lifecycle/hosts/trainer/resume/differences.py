"""What is not as it was when the checkpoint was saved: environment, arguments and data, graded for the run at hand.

The grade of an argument depends on what steers training beside the optimizer's steps: who decides by evaluations, who
reads which arguments. That is told from the scheduler, from the arguments, and from what the code of callbacks and of
the trainer's class stores and reads. Not seen: a callback that acts on a metric otherwise than by stopping.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_lifecycle.bytecode import names_read_by, names_stored_by
from hf_lifecycle.data.loader import obstacle, order_seed
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.resume.arguments import Steering, capture_arguments, compare_arguments
from hf_lifecycle.hosts.trainer.resume.optimizer_settings import without_effect
from hf_lifecycle.hosts.trainer.resume.program import capture_program, same_kinds
from hf_lifecycle.hosts.trainer.resume.schedule import LENGTH, Schedule, takes_metrics
from hf_lifecycle.hosts.trainer.resume.source import ResumeSource
from hf_lifecycle.hosts.trainer.stopping import Stopping
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.environment import Difference, capture_environment, compare

__all__ = ["differences_from", "facts_of", "schedule_unlike"]

_STOPS = frozenset({"should_epoch_stop", "should_training_stop"})
_OF_SCHEDULE = {"learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_ratio", "warmup_steps", *LENGTH}
_OF_DATA = {"examples": "rows of the training data", "elastic": "elastic (LifecycleCallback)"}


def facts_of(args: TrainingArguments, loader: Any, *, elastic: bool = False) -> dict[str, Any]:
    """What this run is like, as it is saved with every checkpoint."""
    dataset = getattr(loader, "dataset", None)
    return {
        "environment": capture_environment(world_size=args.world_size),
        "arguments": capture_arguments(args),
        "data": {
            "examples": len(dataset) if has_length(dataset) else None,
            "order_seed": order_seed(loader) if obstacle(loader) is None else None,
            **({"elastic": True} if elastic else {}),  # which checkpoints of before do not name
        },
        "program": capture_program(present_trainer(), loader),
    }


def differences_from(
    origin: ResumeSource,
    facts: Mapping[str, Any],
    args: TrainingArguments,
    state: TrainerState,
    optimizer: Any,
    scheduler: Any,
    stopping: Stopping,
    schedule: Schedule,
    *,
    streamed: bool,
) -> list[Difference]:
    """Everything that differs between what ``origin`` was saved with and ``facts``; what is harmless, last.

    Args:
        state: Trainer's state, as loaded, with the present number of steps.
        optimizer: The present optimizer, as loaded.
        scheduler: The present scheduler, as loaded.
        stopping: Whether this package decides by evaluations.
    """
    trainer, saved = present_trainer(), origin.saved
    programs = saved["program"], facts["program"]
    steering = _steering_of(args, trainer, scheduler, stopping, streamed=streamed)
    arguments = compare_arguments(saved["arguments"], facts["arguments"], type(args), steering)
    if not origin.without_optimizer:
        arguments = without_effect(
            arguments,
            lambda: schedule.undone_settings() if "optimizer" in same_kinds(*programs) else [],
            lambda names: _readers_of(trainer, names),
            lambda: schedule.keeps_rates(scheduler, optimizer),
        )
    found = [
        *compare(saved["environment"], facts["environment"]),
        *schedule.admit(arguments, args, state, optimizer, scheduler, steering, lambda: _readers_of(trainer, LENGTH)),
        *(replace(one, name=_OF_DATA.get(one.name, one.name)) for one in compare(saved["data"], facts["data"])),
    ]
    return sorted(found, key=lambda one: one.is_harmless)


def schedule_unlike(
    origin: ResumeSource,
    facts: Mapping[str, Any],
    differences: list[Difference],
    state: TrainerState,
    scheduler: Any,
    schedule: Schedule,
) -> tuple[list[Difference], list[str]]:
    """What the schedule is made with now and was not when the run began, that no argument of ``differences`` tells.

    Returns:
        What loading its state has undone, and a sentence for each of the others.
    """
    is_told = any(one.name in _OF_SCHEDULE for one in differences)
    is_same = "scheduler" in same_kinds(origin.saved["program"], facts["program"])
    if is_told or not is_same or origin.without_optimizer:
        return [], []
    return schedule.other_settings(scheduler, state)


def _steering_of(
    args: TrainingArguments, trainer: Any, scheduler: Any, stopping: Stopping, *, streamed: bool
) -> Steering:
    """What the training of ``trainer`` depends on. ``streamed``: its data is a stream."""
    best = args.load_best_model_at_end or stopping.restores_best
    decided = best or stopping.decision is not None or takes_metrics(scheduler)
    return Steering(decided or any(map(_stops_by_evaluations, _callbacks(trainer))), best, streamed)


def _readers_of(trainer: Any, names: frozenset[str]) -> list[str]:
    """The user's classes, of the trainer and its callbacks, whose code reads an attribute of one of these names."""
    kinds = {kind: None for one in (trainer, *_callbacks(trainer)) for kind in type(one).__mro__}
    return [kind.__qualname__ for kind in kinds if is_of_user(kind) and names_read_by(kind) & names]


def _callbacks(trainer: Any) -> list[Any]:
    return list(getattr(getattr(trainer, "callback_handler", None), "callbacks", []))


def _stops_by_evaluations(callback: TrainerCallback) -> bool:
    if type(callback).on_evaluate is TrainerCallback.on_evaluate:
        return False
    return any(names_stored_by(kind) & _STOPS for kind in type(callback).__mro__)
