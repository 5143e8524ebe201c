"""What no event of Trainer's brings, read from the frames of the Trainer that raises the event.

A callback is given neither the trainer, nor the path that ``train()`` resumes from, nor the loss since the last log
row. Names are looked up in Trainer's own methods only; where a version has them no more, the answer is None, and what
depends on it is checked or said by the caller.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerControl
from transformers.trainer_callback import ExportableState

from hf_lifecycle.argument_checks import read_path
from hf_lifecycle.hosts.trainer import intercept
from hf_lifecycle.hosts.trainer.intercept import (
    END_OF_STEP,
    EPOCH,
    EVALUATE,
    LOAD,
    LOAD_BEST,
    LOAD_OPTIMIZER,
    LOOP,
    PLACE,
)
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches

__all__ = [
    "Loaded",
    "amid_evaluation",
    "before_loading",
    "before_method",
    "callbacks_like",
    "callbacks_with_state",
    "counters",
    "left_of_step",
    "loader_in_loop",
    "log_evaluate_save",
    "path_given_to_train",
    "place_in_loop",
    "present_trainer",
    "raise_event",
    "report_missing_names",
    "set_counters",
    "stopped_by_transformers",
    "training_frame",
    "unlogged_loss",
    "within_evaluate",
]

Loaded = Literal["model", "best", "optimizer", "position"]
_Check = Callable[[Any, Path, Loaded], Callable[[Any], Any] | None]
_LOADED: dict[str, Loaded] = {LOAD_BEST: "best", LOAD_OPTIMIZER: "optimizer", PLACE: "position"}
_OR_SUCH = ", such as what latest_checkpoint() returns, or True or None"
_TRAINING = (LOOP, "train")  # train() is public, and has all but what only the loop in it knows


def _frame_of(*methods: str) -> FrameType | None:
    """The innermost frame that runs one of ``methods``; of ``train``, Trainer's alone: modules have one as well."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        name = frame.f_code.co_name
        if name in methods and (name != "train" or hasattr(frame.f_locals.get("self"), "callback_handler")):
            return frame
        frame = frame.f_back
    return None


def _locals_of(*methods: str) -> dict[str, Any]:
    """The local variables of that frame."""
    frame = _frame_of(*methods)
    return {} if frame is None else dict(frame.f_locals)


def training_frame() -> FrameType | None:
    """The frame that is left when training is over, also by an exception. Not to be kept: it holds the trainer."""
    return _frame_of(*_TRAINING)


def present_trainer() -> Any:
    """The trainer that is training; None where that cannot be seen."""
    return _locals_of(*_TRAINING).get("self")


def report_missing_names() -> None:
    """Warn once of each name that is relied on and that the trainer that is training lacks."""
    trainer = present_trainer()
    methods = [inspect.unwrap(one) for name in (LOOP, EPOCH, END_OF_STEP) if (one := getattr(Trainer, name, None))]
    seen = {name for method in methods for name in method.__code__.co_varnames}
    if unlogged_loss(trainer) is not None:
        seen.add(intercept.UNLOGGED_LOSS)
    intercept.report_missing_names(trainer, seen)


def loader_in_loop() -> Any:
    """The loader of the loop that is training; None where that cannot be seen."""
    return _locals_of(LOOP).get("train_dataloader")


def place_in_loop(epoch: int, batches: int) -> tuple[int, int]:
    """The epoch, and how many of its batches it leaves out, that the loop begins with; as given where it shows none."""
    seen = _locals_of(LOOP)
    return seen.get("epochs_trained", epoch), seen.get("steps_trained_in_current_epoch", batches)


def callbacks_like(callback: object) -> int:
    """How many callbacks of the trainer are of the class of ``callback``; 1 where that cannot be seen."""
    handler = getattr(present_trainer(), "callback_handler", None)
    return sum(isinstance(other, type(callback)) for other in getattr(handler, "callbacks", [callback]))


def callbacks_with_state() -> list[str]:
    """The classes of the trainer's callbacks that have a state for Trainer to save."""
    handler = getattr(present_trainer(), "callback_handler", None)
    return [type(other).__name__ for other in getattr(handler, "callbacks", []) if isinstance(other, ExportableState)]


def path_given_to_train() -> Path | None:
    """The directory that ``train()`` resumes from."""
    path = _locals_of(*_TRAINING).get("resume_from_checkpoint")
    return Path(path) if isinstance(path, (str, PathLike)) else None


def before_method(name: str, act: Callable[[], object]) -> Callable[[], None] | None:
    """Let ``act()`` run each time the method ``name`` of the trainer that is training begins.

    Returns what puts the trainer's own method back; None where there is no such method. The class is not touched.
    """

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def method(*given: Any, **named: Any) -> Any:
            act()
            return own(*given, **named)

        return method

    ours = MethodPatches()
    return ours.put_back if ours.replace(present_trainer(), name, make) else None


def raise_event(trainer: Any, event: str) -> None:
    """Let all callbacks hear ``event``, as Trainer's loop does."""
    own = getattr(trainer.callback_handler, event)
    trainer.control = own(trainer.args, trainer.state, trainer.control)


def left_of_step(control: TrainerControl, *, epoch_end_comes_again: bool) -> dict[str, Any]:
    """What Trainer's loop has still to do of the last step when a save is made, and what it logs then.

    The save that the loop makes by itself is the last that it does of a step, or of an epoch's end. A callback may have
    saved before that: ``log``, ``evaluate`` and ``save`` say what ``control`` asks for then.

    Args:
        epoch_end_comes_again: A resumed run raises ``on_epoch_end`` itself, and what it asks for with it.
    """
    seen = _locals_of(END_OF_STEP, EPOCH, LOOP)
    norm, frame = seen.get("grad_norm"), _frame_of(END_OF_STEP, "call_event")
    asked = frame is None or frame.f_code.co_name != END_OF_STEP
    if frame is not None and epoch_end_comes_again and frame.f_locals.get("event") == "on_epoch_end":
        asked = False
    return {
        "log": asked and control.should_log,
        "evaluate": asked and control.should_evaluate,
        "save": asked and control.should_save,
        "grad_norm": norm.item() if isinstance(norm, torch.Tensor) else norm,
        "learning_rate": seen.get("learning_rate"),
    }


def within_evaluate() -> bool:
    """Whether this is called by an ``evaluate()``, and not by the loop around it."""
    frame = _frame_of("evaluate", *_TRAINING)
    return frame is not None and frame.f_code.co_name == "evaluate"


def amid_evaluation() -> bool:
    """Whether the trainer that is training is evaluating, as its loop asked for."""
    frame = _frame_of(EVALUATE, *_TRAINING)
    return frame is not None and frame.f_code.co_name == EVALUATE and frame.f_locals.get("self") is present_trainer()


def log_evaluate_save(trainer: Any, epoch: int, saved: Mapping[str, Any]) -> None:
    """Do what the loop does at the end of a step, and of an epoch, with what :func:`left_of_step` told of the step.

    Nothing is done where this Trainer has no method for that.
    """
    loop, own = _locals_of(LOOP), getattr(trainer, END_OF_STEP, None)
    if own is None or not loop.keys() >= set(intercept.ARGUMENTS_OF_END):
        return
    own(
        unlogged_loss(trainer),
        saved["grad_norm"],
        loop["model"],
        loop["trial"],
        epoch,
        loop["ignore_keys_for_eval"],
        loop["start_time"],
        learning_rate=saved["learning_rate"],
    )


def stopped_by_transformers(trainer: Any) -> bool:
    """Whether an ``EarlyStoppingCallback`` has come to the end of its patience."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
    return any(
        one.early_stopping_patience_counter >= one.early_stopping_patience
        for one in callbacks
        if isinstance(one, EarlyStoppingCallback)
    )


def trainer_in(method: str) -> Any:
    """The trainer whose ``method`` is running; None where that cannot be seen."""
    trainer = _locals_of(method).get("self")
    return trainer if hasattr(trainer, "callback_handler") else None


class _Checked:
    """A loading method of one trainer that has the checkpoint looked at first."""

    def __init__(self, trainer: Any, name: str, check: _Check) -> None:
        self._trainer = weakref.ref(trainer)  # a circle would keep the model until it is found
        self._name = name
        self._own = vars(trainer).get(name)
        self.check = check

    def __call__(self, *given: Any, **named: Any) -> Any:
        caller = sys._getframe(1).f_locals.get("self")  # copy.copy() lets two trainers have one method
        trainer = caller if getattr(caller, "__dict__", {}).get(self._name) is self else self._trainer()
        assert trainer is not None
        path = named.get("resume_from_checkpoint", named.get("checkpoint"))
        if self._name == LOAD_BEST:
            path = trainer.state.best_model_checkpoint
        elif given and self._name != LOOP:
            path = given[3 if self._name == PLACE else 0]
        kind = _LOADED.get(self._name, "model")
        if path is not None:  # training may begin without one
            path = Path(read_path("resume_from_checkpoint", path, hint=_OR_SUCH))
        afterwards = None if path is None else self.check(trainer, path, kind)
        own = self._own if self._own is not None else functools.partial(getattr(type(trainer), self._name), trainer)
        result = own(*given, **named)
        return result if afterwards is None else afterwards(result)

    def is_of(self, trainer: Any) -> bool:
        """Whether it is this trainer's method."""
        return self._trainer() is trainer

    def leave(self, copied: Any) -> None:
        """Let a trainer that came by this method as a copy have the one that was there before."""
        vars(copied).pop(self._name)
        if self._own is not None:
            setattr(copied, self._name, self._own)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_trainer": self._trainer()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({**state, "_trainer": weakref.ref(state["_trainer"])})


def before_loading(trainer: Any, check: _Check) -> None:
    """Let ``check(trainer, checkpoint, what)`` run each time before this one trainer loads from a checkpoint.

    ``what``: "best" where it is loaded by ``load_best_model_at_end``; "optimizer" where optimizer and scheduler are,
    which have been made by then; "position" where Trainer tells which epoch and batch come next. A function that
    ``check`` returns is given the method's result, and gives another. A later call takes the place of an earlier one. A
    DeepSpeed engine loads by itself in the midst of Trainer's loop, so there the loop's begin is what comes before.
    """
    loads_in_its_loop = getattr(trainer, "is_deepspeed_enabled", False)
    for name in (LOAD, *_LOADED, *([LOOP] if loads_in_its_loop else [])):
        present = vars(trainer).get(name)
        if isinstance(present, _Checked) and not present.is_of(trainer):  # of which this one is a shallow copy
            present.leave(trainer)
            present = None
        if isinstance(present, _Checked):
            present.check = check
        elif hasattr(trainer, name):
            setattr(trainer, name, _Checked(trainer, name, check))


def counters(trainer: Any) -> dict[str, int | float]:
    """What the trainer counts over the whole run, logs, and does not save."""
    values = {name: getattr(trainer, name, None) for name in intercept.COUNTERS}
    return {name: value for name, value in values.items() if isinstance(value, (int, float))}


def set_counters(trainer: Any, values: Mapping[str, int | float]) -> None:
    """Let the trainer count on from ``values``."""
    for name, value in values.items():
        if hasattr(trainer, name):
            setattr(trainer, name, value)


def unlogged_loss(trainer: Any = None) -> torch.Tensor | None:
    """The tensor in which Trainer sums the loss since the last log row; to be changed in place only.

    ``trainer``: Whose; None for the one that is training.
    """
    loss = getattr(present_trainer() if trainer is None else trainer, intercept.UNLOGGED_LOSS, None)
    if loss is None:  # before transformers 5.4 it is a local variable of the loop
        loss = _locals_of(END_OF_STEP, LOOP).get("tr_loss")
    return loss if isinstance(loss, torch.Tensor) else None
