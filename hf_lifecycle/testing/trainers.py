"""A training script of one's own, under Trainer, held against itself: never broken off, and broken off and resumed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_lifecycle.checkpoint.directory.admission import latest_checkpoint
from hf_lifecycle.testing.attempts import BrokenOff, end_workers, forget_last_attempt, generators_put_back
from hf_lifecycle.testing.outcome import Outcome
from hf_lifecycle.testing.recorder import Recorder
from hf_lifecycle.testing.report import Report, Resumed, check, counts

__all__ = ["assert_resumes_exactly", "breaks_of"]


class _Breaker(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step >= self._step:
            raise BrokenOff


def breaks_of(break_at: Iterable[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """The broken runs that are asked for, each by the steps after which it is broken off.

    Raises:
        ValueError: None, a step before the first, or steps that do not grow.
    """
    runs = [(each,) if isinstance(each, int) else tuple(each) for each in break_at]
    if not runs:
        raise ValueError("break_at: give at least one step after which the run is broken off")
    for run in runs:
        if not run or run[0] < 1 or list(run) != sorted(set(run)):
            raise ValueError(f"break_at: {run}: steps begin with 1 and grow")
    return runs


def assert_resumes_exactly(
    make_trainer: Callable[[str], Trainer],
    break_at: Iterable[int | Sequence[int]],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Report:
    """Train without a break, without a break once more, and broken off and resumed; all must end with the same bits.

    The breaks are exceptions in this process; before each run accelerate's singletons are forgotten and the global
    random number generators are set to some place, as a new process would have them.

    Args:
        make_trainer: Makes a trainer, with everything it needs made afresh, whose ``output_dir`` is the directory that
            it is given. It is called some times.
        break_at: The steps after which a run is broken off, each by a run of its own; a sequence in it is one run that
            is broken off several times. The run must have saved something before.
        directory: Where the runs are made, in folders that must not be there yet. Default: a temporary directory that
            is removed.

    Returns:
        What was compared.

    Raises:
        NotExact: A run ended differently; names what differed first, and since which step.
        ValueError: ``break_at`` is empty, after the end of the run, or before the first checkpoint; or the trainer
            has another ``output_dir``.

    Example:
        >>> from hf_lifecycle.testing import assert_resumes_exactly
        >>> def test_resume():  # doctest: +SKIP
        ...     print(assert_resumes_exactly(make_trainer, break_at=[5, 12, (3, 9)]))
    """
    breaks = breaks_of(break_at)
    with tempfile.TemporaryDirectory() as temporary, generators_put_back():
        place = Path(temporary if directory is None else directory)
        unbroken = _train(make_trainer, place / "unbroken")
        assert unbroken is not None
        again = _train(make_trainer, place / "unbroken-again")
        assert again is not None
        check("a second unbroken run", unbroken, again, deterministic=False)
        resumed = [_hold_against(unbroken, make_trainer, place, steps) for steps in breaks]
    return Report(int(unbroken.parts["progress"]["global_step"]), tuple(resumed), counts(unbroken))


def _hold_against(
    unbroken: Outcome, make_trainer: Callable[[str], Trainer], place: Path, steps: tuple[int, ...]
) -> Resumed:
    name = "-".join(map(str, steps))
    folder, resumed_at = place / f"broken-{name}", []
    for step in steps:
        ended = _train(make_trainer, folder, broken_at=step)
        if ended is not None:
            raise ValueError(f"break_at={step}: the run has only {ended.parts['progress']['global_step']} steps")
        found = latest_checkpoint(folder)
        if found is None:
            raise ValueError(f"break_at={step}: nothing was saved before; save earlier, or break off later")
        resumed_at.append(int(str(found).rpartition("-")[2]))
    outcome = _train(make_trainer, folder)
    assert outcome is not None
    check(f"the run broken off after step {', '.join(map(str, steps))}", unbroken, outcome, deterministic=True)
    return Resumed(steps, tuple(resumed_at))


def _train(make_trainer: Callable[[str], Trainer], folder: Path, *, broken_at: int | None = None) -> Outcome | None:
    """Start, or go on. None where it was broken off."""
    forget_last_attempt()
    trainer = make_trainer(str(folder))
    if trainer.args.output_dir is None or Path(trainer.args.output_dir).resolve() != folder.resolve():
        raise ValueError(f"make_trainer: output_dir is {trainer.args.output_dir!r}, but {str(folder)!r} was given")
    recorder = Recorder(trainer, with_trail=True)
    recorder.attach()
    if broken_at is not None:
        trainer.add_callback(_Breaker(broken_at))
    try:
        trainer.train(resume_from_checkpoint=latest_checkpoint(folder))
    except BrokenOff:
        return None
    finally:
        end_workers(trainer.callback_handler.train_dataloader)
    return recorder.outcome()
