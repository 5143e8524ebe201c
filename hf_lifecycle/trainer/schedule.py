"""Whether a run that is to make more steps than it was begun for, or fewer, is the one that was begun for as many.

It is where nothing that was done so far would have been otherwise: the schedule has set the same learning rates at each
step until now, and what is to come is decided by the present one. No schedule is known by its name. One of torch's or
transformers' is what its constructor made it, which is compared as it was before anything was loaded; one that is made
of functions of the step (``LambdaLR``) gives its learning rates anew, which are compared with those that were trained
with. Of any other, nothing is said to be exact.

Not seen: that other code depends on the number of steps. What reads it is named in a warning.
"""

from __future__ import annotations

import copy
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

import xxhash
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.messages import few
from hf_lifecycle.state.described import description_digest
from hf_lifecycle.state.environment import Difference, Grade
from hf_lifecycle.state.rng import capture_rng, restore_rng
from hf_lifecycle.trainer.arguments import Steering
from hf_lifecycle.trainer.part import Part

__all__ = ["Schedule", "made_of"]

logger = logging.getLogger("hf_lifecycle")

_LENGTH = frozenset({"max_steps", "num_train_epochs"})
_KNOWN = frozenset({"torch", "transformers"})  # whose schedulers hold in their attributes all that decides them
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def made_of(scheduler: Any) -> str | None:
    """A digest of what a scheduler is, taken before its first step; None where its attributes do not tell."""
    kind = type(scheduler)
    if kind.__module__.partition(".")[0] not in _KNOWN:
        return None
    evaluated = {id(one) for one in _functions_of_the_step(scheduler)}
    if any(id(one) not in evaluated for one in _functions(scheduler)):
        return None
    return description_digest([kind.__module__, kind.__qualname__, scheduler.state_dict()])


def _functions_of_the_step(scheduler: Any) -> list[Any]:
    """Those that a ``LambdaLR`` multiplies its first learning rates by."""
    return list(scheduler.lr_lambdas) if type(scheduler) is LambdaLR else []


def _functions(value: Any) -> Iterator[Any]:
    """Every function that a scheduler, or one within it, holds."""
    if callable(value):
        yield value
    elif isinstance(value, LRScheduler) or type(value).__module__.partition(".")[0] == "transformers":
        yield from _functions({name: one for name, one in vars(value).items() if name != "optimizer"})
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _functions(one)
    elif isinstance(value, Mapping):
        yield from _functions(list(value.values()))


def _with(digest: str, rates: list[Any]) -> str | None:
    """The digest of a row of learning rates and one more step's; None where those lie on a device."""
    if any(type(rate) not in (int, float) for rate in rates):
        return None
    return xxhash.xxh3_128_hexdigest(digest.encode() + array("d", rates).tobytes())


class Schedule(Part):
    """Follows the learning rates, and judges a change of the number of steps.

    Args:
        made: What :func:`made_of` said of the scheduler before a checkpoint was loaded into it, if it was asked.
    """

    key = "schedule"

    def __init__(self, made: str | None) -> None:
        self._made_now = made
        self._made = made  # the scheduler that the run was begun with
        self._steps = 0  # whose learning rates are in the digest
        self._rates: str | None = ""
        self._total: int | None = None
        self._scheduler: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {"made": self._made, "steps": self._steps, "rates": self._rates, "total": self._total}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "made", "steps", "rates", "total")
        self._made, self._steps, self._rates = state["made"], state["steps"], state["rates"]
        self._total = state["total"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._scheduler = kwargs["lr_scheduler"]
        self._total = state.max_steps
        if state.global_step == 0:
            self._made = made_of(self._scheduler)
            self._follow()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._follow()

    def _follow(self) -> None:
        """Take the learning rates of the scheduler's present step into the digest."""
        if self._rates is None or not _functions_of_the_step(self._scheduler):
            return
        step = self._scheduler.last_epoch
        if step == self._steps:
            self._rates = _with(self._rates, [group["lr"] for group in self._scheduler.optimizer.param_groups])
            self._steps += 1
        elif step != self._steps - 1:  # it is not moved where an optimizer step is left out; but nothing else moves it
            self._rates = None

    def release(self, args: TrainingArguments) -> None:
        self._scheduler = None

    def admit(
        self,
        differences: list[Difference],
        args: TrainingArguments,
        state: TrainerState,
        scheduler: Any,
        steering: Steering,
        readers: Callable[[], list[str]],
    ) -> list[Difference]:
        """The differences, with the number of steps graded by what it does.

        Args:
            differences: All that differs.
            args: The present arguments.
            state: Trainer's state, as loaded; ``max_steps`` is what the run is to make now.
            scheduler: The present scheduler, as loaded.
            steering: What training depends on.
            readers: Names the classes of the user's that read the number of steps.
        """
        changed = [one for one in differences if one.name in _LENGTH]
        if not changed:
            return differences
        obstacle = self._obstacle(args, state, scheduler, steering)
        grade = Grade.HARMLESS if obstacle is None else Grade.BREAKS
        why = obstacle or f"exact, since nothing until step {state.global_step} depends on it"
        reading = readers()
        if obstacle is None and self._total != state.max_steps and reading:
            logger.warning(
                "the run makes %d steps in place of %s, and %s reads that number: unless it only shows it, the run is "
                "not the one that was begun for %d",
                state.max_steps,
                self._total,
                few(reading),
                state.max_steps,
            )
        return [replace(one, grade=grade, why=why) if one in changed else one for one in differences]

    def _obstacle(self, args: TrainingArguments, state: TrainerState, scheduler: Any, steering: Steering) -> str | None:
        """Why a run begun for as many steps as now would have been another until here; None if it would not."""
        if self._total == state.max_steps:
            return None
        step = state.global_step
        if step > state.max_steps:
            return f"step {step} is done already"
        kind = type(scheduler).__qualname__
        if self._made is None or self._made_now is None:
            return f"whether the schedule ({kind}) depends on it cannot be told"
        if self._made != self._made_now:
            return f"the schedule ({kind}) would be another one"
        functions = _functions_of_the_step(scheduler)
        if functions:
            if self._rates is None or self._steps != scheduler.last_epoch + 1:
                return "the learning rates until here are not known"
            rates = _rates_of(scheduler, functions, self._steps)
            if rates is None:
                return f"whether the schedule ({kind}) depends on it cannot be told"
            if rates != self._rates:
                return f"the schedule would have set other learning rates until step {step}"
        if steering.evaluations and self._would_fall_elsewhere(args, state, "eval"):
            return "evaluations, which training depends on, would have been at other steps"
        if steering.best and self._would_fall_elsewhere(args, state, "save"):
            return "saves, from which the best is loaded in the end, would have been at other steps"
        return None

    def _would_fall_elsewhere(
        self, args: TrainingArguments, state: TrainerState, kind: Literal["eval", "save"]
    ) -> bool:
        """Whether evaluations or saves come by a share of all steps, or one came because training ended here."""
        strategy, given = getattr(args, f"{kind}_strategy"), getattr(args, f"{kind}_steps")
        has_ended = self._total is not None and state.global_step >= self._total
        if strategy == IntervalStrategy.EPOCH:
            return has_ended and not float(state.epoch).is_integer()
        if strategy != IntervalStrategy.STEPS:
            return False
        return given < 1 or (has_ended and state.global_step % getattr(state, f"{kind}_steps") != 0)


def _rates_of(scheduler: LambdaLR, functions: list[Any], steps: int) -> str | None:
    """The digest of the learning rates that a scheduler sets in its first steps; None if it cannot be told.

    The scheduler is not touched, nor are the random number generators.
    """
    digest: str | None = ""
    before = capture_rng()
    try:
        called = [_callable(one) for one in functions]
        for step in range(steps):
            pairs = zip(scheduler.base_lrs, called, strict=True)
            digest = None if digest is None else _with(digest, [rate * one(step) for rate, one in pairs])
    except _FAILURES:
        return None
    finally:
        restore_rng(before)
    return digest


def _callable(function: Any) -> Any:
    """A function itself; of an object that can be called, a copy, since it may keep a state."""
    inner = function.func if isinstance(function, partial) else function
    if isinstance(inner, FunctionType):
        return function
    if isinstance(inner, MethodType):
        raise TypeError("its object decides what it gives")
    return copy.deepcopy(function)
