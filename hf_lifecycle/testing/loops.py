"""A custom training loop held against itself: it tells a probe of each step, and the probe breaks it off."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.rng.states import capture_rng
from hf_lifecycle.testing.attempts import BrokenOff, forget_last_attempt, prove
from hf_lifecycle.testing.outcome import Outcome, digest, keep, read
from hf_lifecycle.testing.report import Report

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
        """Tell of a step when it is done, its save included. This is where a run is interrupted.

        Args:
            step: Which step of the whole run, from 1: a resumed loop continues counting.
            batch: What was trained on.
            loss: What it came to.
            model: What is trained; its tensors are digested.
        """
        if self._first is None:
            self._first = step
        elif step - 1 not in self._trail:
            raise ValueError(
                f"probe.step({step}) was called after step {max(self._trail)}: call it once for every step"
            )
        seen = {"batches": batch, "loss": loss, "weights": None if model is None else module_tensors(model)}
        self._trail[step] = {kind: digest(tree) for kind, tree in seen.items() if tree is not None}
        self._trail[step] |= {f"RNG state of {source}": state for source, state in _generators().items()}
        if step == self._broken_at:
            raise BrokenOff

    def outcome(self, ended_with: Mapping[str, Any] | None) -> Outcome:
        """What the loop told, and ended with; None where it was interrupted."""
        if self._first is None:
            raise ValueError("run never called probe.step(...)")
        now, parts = _generators(), dict[str, dict[str, Any]]()
        if ended_with is not None:
            parts = {name: keep(read(thing)) for name, thing in ended_with.items()}
            parts["rng"] = keep(capture_rng().state_dict())
        batches = {(step - 1, 0): kinds["batches"] for step, kinds in self._trail.items() if "batches" in kinds}
        unused = frozenset(source for source, state in self._at_start.items() if now.get(source) == state)
        return Outcome(self._first - 1, parts, [], batches, self._trail, unused)


def assert_loop_resumes_exactly(
    run: Callable[[str, Probe], Mapping[str, Any]],
    break_at: Iterable[int | Sequence[int]],
    *,
    directory: str | os.PathLike[str] | None = None,
) -> Report:
    """As :func:`~hf_lifecycle.testing.assert_resumes_exactly`, for a custom training loop, with Accelerate or without.

    Args:
        run: Trains into the directory that it is given: starts where nothing is there, and continues where something
        is.
            It makes everything afresh, calls :meth:`Probe.step` at the end of each step, and returns what it ended with
            by name: objects with ``state_dict()``, or values.
        break_at: The steps after which a run is interrupted, as for a trainer.
        directory: Where the runs are made. Default: a temporary directory.

    Raises:
        NotExact: A run ended differently; names what differed first, and since which step.
        ValueError: ``break_at`` is empty or after the end, or a run that was interrupted began again at step 1.

    Example:
        >>> def run(output_dir, probe):
        ...     manager = ...  # resumes from output_dir
        ...     for batch in manager.batches(loader):
        ...         loss = train_on(batch)
        ...         probe.step(manager.step, batch=batch, loss=loss, model=model)
        ...     return {"model": model, "optimizer": optimizer}
    """

    def train(folder: Path, broken_at: int | None) -> Outcome:
        forget_last_attempt()
        folder.mkdir(parents=True, exist_ok=True)
        probe = Probe(broken_at)
        try:
            return probe.outcome(run(str(folder), probe))
        except BrokenOff:
            return probe.outcome(None)

    return prove(train, break_at, directory)
