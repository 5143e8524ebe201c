"""A loop of one's own held against itself: it tells a probe of each step, and the probe breaks it off."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.rng import capture_rng
from hf_lifecycle.testing.attempts import BrokenOff, forget_last_attempt, generators_put_back
from hf_lifecycle.testing.outcome import Outcome, digest
from hf_lifecycle.testing.recorder import keep, read
from hf_lifecycle.testing.report import Report, Resumed, check, counts
from hf_lifecycle.testing.trainers import breaks_of

__all__ = ["Probe", "assert_loop_resumes_exactly"]


def _generators() -> dict[str, str]:
    return {source: digest(state) for source, state in capture_rng().state_dict().items()}


class Probe:
    """What a loop tells of each of its steps, and what breaks it off."""

    def __init__(self, broken_at: int | None = None) -> None:
        self._broken_at = broken_at
        self._at_start = _generators()
        self._first: int | None = None
        self._trail: dict[int, dict[str, str]] = {}

    def step(self, step: int, *, batch: Any = None, loss: Any = None, model: torch.nn.Module | None = None) -> None:
        """Tell of a step when it is done, its save included. This is where a run is broken off.

        Args:
            step: Which step of the whole run, from 1: a resumed loop goes on counting.
            batch: What was trained on.
            loss: What it came to.
            model: What is trained; its tensors are digested.
        """
        if self._first is None:
            self._first = step
        elif step - 1 not in self._trail:
            raise ValueError(f"probe.step({step}) came after step {max(self._trail)}: tell of every step, once")
        seen = {"batches": batch, "loss": loss, "weights": None if model is None else module_tensors(model)}
        self._trail[step] = {kind: digest(tree) for kind, tree in seen.items() if tree is not None}
        self._trail[step] |= {f"random numbers of {source}": state for source, state in _generators().items()}
        if step == self._broken_at:
            raise BrokenOff

    def outcome(self, ended_with: Mapping[str, Any]) -> Outcome:
        """What the loop told, and ended with."""
        if self._first is None:
            raise ValueError("run: never called probe.step(...)")
        parts = {name: keep(read(thing)) for name, thing in ended_with.items()}
        parts["rng"] = keep(capture_rng().state_dict())
        batches = {(step - 1, 0): kinds["batches"] for step, kinds in self._trail.items() if "batches" in kinds}
        return Outcome(self._first - 1, parts, [], batches, self._trail)

    def untouched(self) -> set[str]:
        """The generators that are where they were at the start: neither seeded nor drawn from."""
        now = _generators()
        return {source for source, state in self._at_start.items() if now.get(source) == state}

    @property
    def last(self) -> int:
        """The last step told of."""
        return max(self._trail, default=0)

    @property
    def first(self) -> int:
        """The first step told of."""
        return self._first or 0


def assert_loop_resumes_exactly(
    run: Callable[[str, Probe], Mapping[str, Any]],
    break_at: Iterable[int | Sequence[int]],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Report:
    """As :func:`~hf_lifecycle.testing.assert_resumes_exactly`, for a loop of one's own, with Accelerate or without.

    Args:
        run: Trains into the directory that it is given: starts where nothing is there, and goes on where something is.
            It makes everything afresh, calls :meth:`Probe.step` at the end of each step, and returns what it ended with
            by name: objects with ``state_dict()``, or values.
        break_at: The steps after which a run is broken off, as for a trainer.
        directory: Where the runs are made. Default: a temporary directory.

    Raises:
        NotExact: A run ended differently; names what differed first, and since which step.
        ValueError: ``break_at`` is empty or after the end, or a run that was broken off began again at step 1.

    Example:
        >>> def run(output_dir, probe):
        ...     manager = ...  # resumes from output_dir
        ...     for batch in manager.batches(loader):
        ...         loss = train_on(batch)
        ...         probe.step(manager.step, batch=batch, loss=loss, model=model)
        ...     return {"model": model, "optimizer": optimizer}
    """
    breaks = breaks_of(break_at)
    with tempfile.TemporaryDirectory() as temporary, generators_put_back():
        place = Path(temporary if directory is None else directory)
        unbroken, probe = _run(run, place / "unbroken")
        # Where a loop leaves a generator alone, its position is no part of the run.
        unused = probe.untouched()
        again, _ = _run(run, place / "unbroken-again")
        assert unbroken is not None
        assert again is not None
        expected = _without(unbroken, unused)
        check("a second unbroken run", expected, _without(again, unused), deterministic=False)
        resumed = [_hold_against(expected, unused, run, place, each) for each in breaks]
    return Report(probe.last, tuple(resumed), counts(expected))


def _without(outcome: Outcome, sources: set[str]) -> Outcome:
    """``outcome`` less the positions of some generators."""
    rng = {path: leaf for path, leaf in outcome.parts["rng"].items() if path.split(".")[0].split("[")[0] not in sources}
    left_out = {f"random numbers of {source}" for source in sources}
    trail = {
        step: {kind: found for kind, found in kinds.items() if kind not in left_out}
        for step, kinds in outcome.trail.items()
    }
    return replace(outcome, parts={**outcome.parts, "rng": rng}, trail=trail)


def _run(
    run: Callable[[str, Probe], Mapping[str, Any]], folder: Path, broken_at: int | None = None
) -> tuple[Outcome | None, Probe]:
    """Start, or go on. No outcome where it was broken off."""
    forget_last_attempt()
    folder.mkdir(parents=True, exist_ok=True)
    probe = Probe(broken_at)
    try:
        return probe.outcome(run(str(folder), probe)), probe
    except BrokenOff:
        return None, probe


def _hold_against(
    unbroken: Outcome,
    unused: set[str],
    run: Callable[[str, Probe], Mapping[str, Any]],
    place: Path,
    steps: tuple[int, ...],
) -> Resumed:
    name = ", ".join(map(str, steps))
    folder, resumed_at = place / f"broken-{name.replace(', ', '-')}", []
    for broken_at in (*steps, None):
        outcome, probe = _run(run, folder, broken_at)
        if outcome is not None and broken_at is not None:
            raise ValueError(f"break_at={broken_at}: the run went on to its end, step {probe.last}")
        if broken_at != steps[0]:
            resumed_at.append(probe.first - 1)
            if probe.first == 1:
                raise ValueError(f"break_at={name}: the run began again at step 1; nothing was saved before, or found")
    assert outcome is not None
    check(f"the run broken off after step {name}", unbroken, _without(outcome, unused), deterministic=True)
    return Resumed(steps, tuple(resumed_at))
