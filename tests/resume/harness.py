"""Trains a case without a break, and broken off and resumed, everything made afresh each time.

The break is an exception that leaves this process alive; ``process.py`` kills a real one. Nothing is carried from one
attempt to the next but the directory: a new model, new data, new callbacks, new singletons of accelerate, and global
generators that were scrambled before anything was built.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle.testing.attempts import BrokenOff, end_workers, forget_last_attempt

from .outcome import Outcome, Recorder

__all__ = [
    "Arm",
    "Attempt",
    "Break",
    "BrokenOff",
    "Case",
    "attempt",
    "forget_last_attempt",
    "missing_packages",
    "run_broken",
    "run_unbroken",
]

Arm = Literal["callback", "stock"]


@dataclass(frozen=True, slots=True)
class Break:
    """Where a run is broken off: at the event ``at``, when ``global_step`` has reached ``step``, the ``count``-th time.

    ``at="the end"`` lets the run come to its end: what is resumed is a run that has ended.
    """

    step: int
    at: str = "on_step_begin"
    count: int = 1


class Breaker(TrainerCallback):
    """Raises :class:`BrokenOff`, after ``act()``, at the break. Add it after all other callbacks."""

    def __init__(self, where: Break, act: Callable[[], None] | None = None) -> None:
        self._where, self._act, self._met = where, act, 0
        setattr(self, where.at, self._meet)

    def _meet(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < self._where.step:
            return
        self._met += 1
        if self._met == self._where.count:
            if self._act is not None:
                self._act()
            raise BrokenOff(f"{self._where.at} at step {state.global_step}")


@dataclass(slots=True)
class Attempt:
    """One call of the training script: what :attr:`Case.build` gets to build a trainer from.

    Attributes:
        output_dir: Where checkpoints go.
        arm: With the callback under test, or stock Trainer.
        options: What differs between the attempts (``num_workers`` of the resumed one, say).
        watched: More state that must survive, by name; filled by :meth:`watch`.
    """

    output_dir: Path
    arm: Arm
    options: Mapping[str, Any] = field(default_factory=dict)
    watched: dict[str, Any] = field(default_factory=dict)

    def callbacks(self, *stock: TrainerCallback, **settings: Any) -> list[TrainerCallback]:
        """The callback under test with these settings; in the stock arm, what stock Trainer has in its place."""
        if self.arm == "stock":
            return list(stock)
        from hf_lifecycle import LifecycleCallback

        return [LifecycleCallback(**settings)]

    def args(self, kind: type[TrainingArguments] = TrainingArguments, **settings: Any) -> Any:
        """Training arguments: 12 steps, a save and a log row every 4, unless ``settings`` say otherwise."""
        defaults: dict[str, Any] = {
            "output_dir": str(self.output_dir),
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 8,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "save_strategy": "steps",
            "save_steps": 4,
            "logging_steps": 4,
        }
        return kind(**{**defaults, **settings, **self.options.get("args", {})})

    def watch(self, name: str, thing: Any) -> Any:
        """Compare the state of ``thing`` at the end of training too; returns it."""
        self.watched[name] = thing
        return thing


Resume = Callable[[Path], tuple[Path, str | bool]]


def in_place(output_dir: Path) -> tuple[Path, str | bool]:
    """Resume as the same script would: same directory, newest checkpoint."""
    return output_dir, True


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of training that must be exact.

    Attributes:
        name: As in the table and in the test's name.
        about: One line for the reader of the table.
        build: Makes a trainer, everything afresh.
        breaks: One for each attempt but the last.
        resumed_options: What differs in the resumed attempts (:attr:`Attempt.options`).
        resume: Where to go on: output directory and ``resume_from_checkpoint``.
        core: Runs against the oldest supported versions too.
        needs: Packages without which the case is left out.
    """

    name: str
    about: str
    build: Callable[[Attempt], Trainer]
    breaks: tuple[Break, ...] = (Break(step=10),)
    resumed_options: Mapping[str, Any] = field(default_factory=dict)
    resume: Resume = in_place
    core: bool = False
    needs: tuple[str, ...] = ()


def missing_packages(case: Case) -> list[str]:
    """The packages that the case needs and that are not installed."""
    return [name for name in case.needs if importlib.util.find_spec(name) is None]


def attempt(
    case: Case,
    run: Attempt,
    *,
    resume_from: str | bool | None = None,
    broken_at: Break | None = None,
    act: Callable[[], None] | None = None,
) -> Outcome | None:
    """Call the training script once. None where it was broken off.

    Args:
        case: What to train.
        run: With what.
        resume_from: As ``Trainer.train`` takes it.
        broken_at: Where to break off; None lets it come to its end.
        act: What to do at the break in place of raising.
    """
    forget_last_attempt()
    trainer = case.build(run)
    recorder = Recorder(trainer, run.watched)
    recorder.attach()
    if broken_at is not None:
        trainer.add_callback(Breaker(broken_at, act))
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except BrokenOff:
        return None
    finally:
        end_workers(trainer.callback_handler.train_dataloader)
    assert broken_at is None or broken_at.at == "the end", f"{case.name}: never came to {broken_at}"
    return recorder.outcome()


def run_unbroken(case: Case, output_dir: Path, arm: Arm, options: Mapping[str, Any] | None = None) -> Outcome:
    """Train to the end in one go."""
    outcome = attempt(case, Attempt(output_dir, arm, dict(options or {})))
    assert outcome is not None
    return outcome


def run_broken(case: Case, output_dir: Path, arm: Arm, options: Mapping[str, Any] | None = None) -> Outcome:
    """Train, be broken off at each of the case's breaks, and come to the end by resuming."""
    given = dict(options or {})
    run, resume_from = Attempt(output_dir, arm, given), None
    for broken_at in case.breaks:
        attempt(case, run, resume_from=resume_from, broken_at=broken_at)
        output_dir, resume_from = case.resume(output_dir)
        run = Attempt(output_dir, arm, {**given, **case.resumed_options})
    outcome = attempt(case, run, resume_from=resume_from)
    assert outcome is not None
    assert outcome.started_at > 0, f"{case.name}: began again at step 0 instead of resuming"
    return outcome
