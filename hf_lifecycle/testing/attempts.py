"""A training held against itself: uninterrupted, uninterrupted again, and interrupted and resumed, all in one process.

Its runs know no more of each other than processes would. What a module of the user's keeps from run to run (an iterator
at module level, a cache) stays: nothing can take that away, and the second uninterrupted run tells of it.
"""

from __future__ import annotations

import gc
import os
import random
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_lifecycle import torch_internals
from hf_lifecycle.hosts.accelerate.intercept import forget_singletons
from hf_lifecycle.state.rng.states import capture_rng, restore_rng
from hf_lifecycle.testing.outcome import Outcome
from hf_lifecycle.testing.report import Report, Resumed, check, counts

__all__ = ["BrokenOff", "end_workers", "forget_last_attempt", "prove"]


class BrokenOff(BaseException):
    """Training was interrupted. Not an ``Exception``: no one may catch it and continue."""


Train = Callable[[Path, "int | None"], Outcome]
"""Starts in a folder, or continues there, and is interrupted after the step that is given."""


def forget_last_attempt() -> None:
    """What a new process would not know: accelerate's singletons, and the position of the global generators."""
    gc.collect()
    forget_singletons()
    scramble = random.SystemRandom().getrandbits(32)
    random.seed(scramble)
    np.random.seed(scramble)
    torch.manual_seed(scramble)


def end_workers(loader: Any) -> None:
    """End persistent workers: left to the garbage collector, torch waits five seconds for each."""
    torch_internals.end_workers(getattr(loader, "base_dataloader", loader))


def prove(train: Train, break_at: Iterable[int | Sequence[int]], directory: str | os.PathLike[str] | None) -> Report:
    """Train uninterrupted twice, and once for each entry of ``break_at`` interrupted and resumed, and compare.

    Raises:
        NotExact: A run ended differently.
        ValueError: The breaks prove nothing.
    """
    breaks = _breaks_of(break_at)
    with tempfile.TemporaryDirectory() as temporary, _generators_put_back():
        place = Path(temporary if directory is None else directory)
        uninterrupted = train(place / "uninterrupted", None)
        unused, uninterrupted = uninterrupted.unused, _without(uninterrupted, uninterrupted.unused)
        again = train(place / "uninterrupted-again", None)
        check("a second uninterrupted run", uninterrupted, _without(again, unused), deterministic=False)
        resumed = []
        for steps in breaks:
            attempts = list(_broken(train, place / f"broken-{'-'.join(map(str, steps))}", steps))
            name = f"the run interrupted after step {', '.join(map(str, steps))}"
            check(name, uninterrupted, _without(attempts[-1], unused), deterministic=True)
            resumed.append(Resumed(steps, tuple(attempt.started_at for attempt in attempts[1:])))
    return Report(uninterrupted.last_step, tuple(resumed), counts(uninterrupted))


def _breaks_of(break_at: Iterable[int | Sequence[int]]) -> list[tuple[int, ...]]:
    """The broken runs that are asked for, each by the steps after which it is interrupted."""
    runs = [(each,) if isinstance(each, int) else tuple(each) for each in break_at]
    if not runs:
        raise ValueError("break_at: give at least one step after which the run is interrupted")
    for run in runs:
        if not run or run[0] < 1 or list(run) != sorted(set(run)):
            raise ValueError(f"break_at: {run}: steps must start at 1 or later, and grow")
    return runs


def _broken(train: Train, folder: Path, steps: tuple[int, ...]) -> Iterator[Outcome]:
    """The attempts of one run that is interrupted; the last comes to the end."""
    for broken_at in (*steps, None):
        attempt = train(folder, broken_at)
        if broken_at != steps[0] and attempt.started_at == 0:
            raise ValueError(
                f"break_at={steps}: the resumed run started again at step 1: nothing was saved before, "
                "or it was not found"
            )
        if broken_at is not None and attempt.ended:
            raise ValueError(f"break_at={broken_at}: the run has only {attempt.last_step} steps")
        yield attempt


def _without(outcome: Outcome, sources: Collection[str]) -> Outcome:
    """``outcome`` less the positions of some generators."""
    rng = {path: leaf for path, leaf in outcome.parts["rng"].items() if path.split(".")[0].split("[")[0] not in sources}
    left_out = {f"RNG state of {source}" for source in sources}
    trail = {
        step: {kind: found for kind, found in kinds.items() if kind not in left_out}
        for step, kinds in outcome.trail.items()
    }
    return replace(outcome, parts={**outcome.parts, "rng": rng}, trail=trail)


@contextmanager
def _generators_put_back() -> Iterator[None]:
    """The global generators come out as they went in, whatever the runs within drew."""
    before = capture_rng()
    try:
        yield
    finally:
        restore_rng(before)
