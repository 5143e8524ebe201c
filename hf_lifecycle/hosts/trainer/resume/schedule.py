"""Whether a run that is to make more steps than it was begun for, or fewer, is the one that was begun for as many.

It is where nothing that was done so far would have been otherwise. No schedule is known by its name: the present one is
stepped apart from the training, from what it was before the checkpoint was loaded into it, and its learning rates are
compared with those that were trained with. Where they are the same until now, training continues with the settings of
the present one. A scheduler that takes metrics is compared as it was made.

A run that had made all of its steps may be made longer in any case: what continues is then a new run, and a warning
says what differs from one that was begun with as many steps.

Not seen: that other code depends on the number of steps. What reads it is named in a warning.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from transformers import IntervalStrategy, TrainerState, TrainingArguments

from hf_lifecycle.engine.made_with import in_effect, settings_of, settings_of_schedule, unlike_settings
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.resume.arguments import Steering
from hf_lifecycle.hosts.trainer.resume.schedule_dry_run import DryRun, rates_with
from hf_lifecycle.messages import few
from hf_lifecycle.state.environment import Difference, Grade
from hf_lifecycle.state.values.described import description_digest

__all__ = ["LENGTH", "Schedule", "takes_metrics"]

logger = logging.getLogger("hf_lifecycle")

LENGTH = frozenset({"max_steps", "num_train_epochs"})
_OWN = "the scheduler"  # what its settings are by among those of the optimizer


def takes_metrics(scheduler: Any) -> bool:
    """Whether a scheduler is stepped by evaluations."""
    return scheduler is not None and "metrics" in inspect.signature(scheduler.step).parameters


def _made(scheduler: Any) -> str | None:
    """A digest of what a scheduler that takes metrics is, before its first step; of others None."""
    if not takes_metrics(scheduler):
        return None
    kind = type(scheduler)
    return description_digest([kind.__module__, kind.__qualname__, scheduler.state_dict()])


class Schedule(Component):
    """Follows the learning rates, and judges a change of the number of steps.

    Args:
        dry: The scheduler before a checkpoint was loaded into it, where it could be copied then.
    """

    key = "schedule"

    def __init__(self, dry: DryRun | None) -> None:
        self._dry = dry
        self._made: str | None = None  # of the scheduler that the run was begun with
        self._steps = 0  # whose rates are in the digest
        self._rates: str | None = ""
        self._total: int | None = None
        self._settings: dict[str, Any] = {}  # of the optimizer and the scheduler that the run was begun with
        self._trainer: Any = None
        self._optimizer: Any = None
        self._followed = 0  # the global step that was

    def state_dict(self) -> dict[str, Any]:
        own = {"made": self._made, "steps": self._steps, "rates": self._rates, "total": self._total}
        return {**own, "settings": self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "made", "steps", "rates", "total", "settings")
        self._made, self._steps, self._rates = state["made"], state["steps"], state["rates"]
        self._total, self._settings = state["total"], state["settings"]

    def on_train_begin(self, event: Event) -> None:
        scheduler = event.more["lr_scheduler"]
        if self._dry is not None and self._dry.is_new:
            is_longer, made = self._total != event.state.max_steps, self._dry.settings
            self._settings[_OWN] = made if is_longer else in_effect(self._settings.get(_OWN, {}), made)
        self._dry = None
        self._total = event.state.max_steps
        if event.state.global_step == 0:
            self._made, self._settings = _made(scheduler), settings_of(event.more["optimizer"].param_groups)
            self._settings[_OWN] = settings_of_schedule(scheduler)
        if takes_metrics(scheduler):
            return
        self._trainer, self._optimizer = present_trainer(), event.more["optimizer"]
        self._followed = event.state.global_step
        if event.state.global_step == 0:
            self._follow()

    def on_step_end(self, event: Event) -> None:
        self._end_step(event.state)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._end_step(state)  # a callback that hears of the step's end before us saves

    def _end_step(self, state: TrainerState) -> None:
        if self._followed == state.global_step:
            return
        self._followed = state.global_step
        if not getattr(getattr(self._trainer, "accelerator", None), "optimizer_step_was_skipped", False):
            self._follow()

    def _follow(self) -> None:
        """Take the rates that the schedule has set for the next step into the digest."""
        if self._optimizer is not None and self._rates is not None:
            self._rates = rates_with(self._rates, self._optimizer.param_groups)
            self._steps += 1

    def release(self, args: TrainingArguments) -> None:
        self._trainer = self._optimizer = self._dry = None

    def undone_settings(self) -> list[Difference]:
        """What the optimizer is made with now and was not then, which loading its state has undone."""
        if self._dry is None or not self._dry.is_new:
            return []
        saved = {name: one for name, one in self._settings.items() if name != _OWN}
        return unlike_settings(saved, settings_of(self._dry.optimizer.param_groups), saved, "the optimizer")[0]

    def other_settings(self, scheduler: Any, state: TrainerState) -> tuple[list[Difference], list[str]]:
        """What the scheduler is made with now and was not then, at the same length of the run.

        Returns:
            What loading its state has undone, and a sentence for each of the others.
        """
        if self._dry is None or not self._dry.is_new or self._total != state.max_steps:
            return [], []
        loaded = settings_of_schedule(scheduler)
        return unlike_settings(self._settings.get(_OWN, {}), self._dry.settings, loaded, _OWN)

    def keeps_rates(self, scheduler: Any, optimizer: Any) -> bool:
        """Whether the schedule sets the learning rates that were trained with, beginning with those that were loaded.

        It does not where its functions hold the learning rate of the arguments (a lowest one that is a share of it).
        """
        if takes_metrics(scheduler):
            return True
        if self._dry is None or self._rates is None:
            return False
        dry = self._dry.copy()
        dry.set_rates(optimizer.param_groups)
        return dry.rates(self._steps) == self._rates

    def admit(
        self,
        differences: list[Difference],
        args: TrainingArguments,
        state: TrainerState,
        optimizer: Any,
        scheduler: Any,
        steering: Steering,
        readers: Callable[[], list[str]],
    ) -> list[Difference]:
        """The differences, with the number of steps graded by what it does.

        Args:
            state: Trainer's state, as loaded; ``max_steps`` is what the run is to make now.
            scheduler: The present scheduler, as loaded; it takes the present settings where the length is admitted.
            readers: Names the classes of the user's that read the number of steps.
        """
        changed = [one for one in differences if one.name in LENGTH]
        if not changed:
            return differences
        obstacle = self._obstacle(args, state, optimizer, scheduler, steering)
        grade = Grade.HARMLESS if obstacle is None else Grade.BREAKS
        why = obstacle or f"exact, since nothing until step {state.global_step} depends on it"
        if obstacle is None and self._total != state.max_steps:
            why += self._go_on_as_made(scheduler)
        reading = readers()
        if obstacle is None and self._total != state.max_steps and reading:
            logger.warning(
                "the run now has %d steps instead of %s, and %s reads that number: if it uses it for more than "
                "display, the run differs from one that was started with %d steps",
                state.max_steps,
                self._total,
                few(reading),
                state.max_steps,
            )
        return [replace(one, grade=grade, why=why) if one in changed else one for one in differences]

    def has_no_step_left(self, differences: list[Difference], state: TrainerState) -> bool:
        """Whether nothing is trained now, so that ``differences``, from what was saved, move no bit.

        That is so where the run had ended, or is asked to have fewer steps than it has made. It is not where other
        differences alone, such as fewer rows, make its epochs shorter: that may be a mistake.
        """
        return state.global_step >= state.max_steps and (self._has_ended(state) or _are_of_length(differences))

    def is_made_longer(self, differences: list[Difference], state: TrainerState) -> bool:
        """Whether more steps are asked of a run that had made all of its own, and nothing else differs."""
        return self._has_ended(state) and _are_of_length(differences)

    def _has_ended(self, state: TrainerState) -> bool:
        return self._total is not None and state.global_step >= self._total

    def _obstacle(
        self, args: TrainingArguments, state: TrainerState, optimizer: Any, scheduler: Any, steering: Steering
    ) -> str | None:
        """Why a run begun for as many steps as now would have been another until here; None if it would not."""
        if self._total == state.max_steps:
            return None
        step = state.global_step
        if step > state.max_steps:
            return f"step {step} is already done"
        kind = type(scheduler).__qualname__
        unknown = f"it is unknown whether the schedule ({kind}) depends on it"
        if self._dry is None:
            return unknown
        if takes_metrics(scheduler):
            if self._made != _made(self._dry.scheduler):
                return f"the schedule ({kind}) would be different"
        elif self._rates is None:
            return "the learning rates until this step are unknown"
        else:
            self._dry.set_rates(optimizer.param_groups)
            rates = self._dry.rates(self._steps)
            if rates is None:
                return unknown
            unlike = self._dry.unlike(scheduler)
            moved = [name for name in unlike if self._dry.has_moved(name)]
            if rates != self._rates:
                loaded = few([f"{name}={other!r}" for name, (_, other) in unlike.items() if name not in moved])
                brought = f"; the checkpoint restores {loaded}" if loaded else ""
                return f"the schedule would have set different learning rates until step {step}{brought}"
            if moved:
                return f"the schedule ({kind}) would be different, by {few(moved)} of its state"
        if steering.evaluations and self._would_fall_elsewhere(args, state, "eval"):
            return "evaluations, on which training depends, would have been at other steps"
        if steering.best and self._would_fall_elsewhere(args, state, "save"):
            return "saves, from which the best model is loaded at the end, would have been at other steps"
        return None

    def _go_on_as_made(self, scheduler: Any) -> str:
        """Let the scheduler be what it would be, had it been made for as many steps. Returns what that changed."""
        if self._dry is None or takes_metrics(scheduler):
            return ""
        unlike = self._dry.unlike(scheduler)
        if not unlike:
            return ""
        scheduler.load_state_dict(copy.deepcopy(self._dry.scheduler.state_dict()))
        changed = few([f"{name}={one!r} instead of {other!r}" for name, (one, other) in unlike.items()])
        return f"; the schedule continues with {changed}"

    def _would_fall_elsewhere(
        self, args: TrainingArguments, state: TrainerState, kind: Literal["eval", "save"]
    ) -> bool:
        """Whether evaluations or saves come by a share of all steps, or one came because training ended here."""
        strategy, given = getattr(args, f"{kind}_strategy"), getattr(args, f"{kind}_steps")
        has_ended = self._has_ended(state)
        if strategy == IntervalStrategy.EPOCH:
            return has_ended and not float(state.epoch).is_integer()
        if strategy != IntervalStrategy.STEPS:
            return False
        return given < 1 or (has_ended and state.global_step % getattr(state, f"{kind}_steps") != 0)


def _are_of_length(differences: list[Difference]) -> bool:
    """Whether nothing differs but the number of steps."""
    return all(one.is_harmless or one.name in LENGTH for one in differences)
