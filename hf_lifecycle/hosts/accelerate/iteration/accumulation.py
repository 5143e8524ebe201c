"""On which batches of a pass the optimizer steps, and whether it continues so after a resume.

Where a loop accumulates gradients by hand, it steps on every n-th batch, by a number that Python's ``enumerate`` begins
anew where a pass is resumed: the steps then fall on other batches, and nothing fails. Promise: a pass that is resumed
and whose first step falls on another batch than those before (or whose last batch has none, where it had one) is
reported, once. Not seen: fewer than two steps of a pass before the break together with fewer than two after it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

__all__ = ["NOTHING_KNOWN", "Accumulation"]

logger = logging.getLogger("hf_lifecycle")

NOTHING_KNOWN = {"every": None, "step": None, "ends_early": False}  # what is saved of a loader without steps


class Accumulation:
    """The steps in the passes of one loader."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._every: int | None = None  # batches from step to step; 0 where that differs
        self._step: int | None = None  # the number of the last batch with a step, the last of the pass aside
        self._latest: int | None = None  # the same, when nobody knows yet whether it is the last of the pass
        self._last = 0  # the number of the batch at hand
        self._ends_early = False  # whether the last whole pass had a step on its last batch, before it was due
        self._expected: Mapping[str, Any] = NOTHING_KNOWN  # of the steps after a resume

    def begin(self, *, inside: bool) -> None:
        """A pass begins; ``inside``: it was resumed."""
        if not inside:
            self._expected = NOTHING_KNOWN
        self._every = self._step = self._latest = None

    def stepped(self, number: int) -> None:
        """An optimizer stepped on this batch, counted from 0."""
        self._latest = number

    def follows(self, number: int) -> None:
        """This batch is handed out, so that the one before was not the last of the pass."""
        self._last = number
        if self._latest is None:
            return
        latest, self._latest = self._latest, None
        gap = None if self._step is None else latest - self._step
        self._every, self._step = self._with(gap), latest
        before, every = self._expected["step"], self._expected["every"] or gap
        if before is not None and every is not None:
            self._expected = {**self._expected, "step": None}
            if (latest - before) % every:
                self._report(f"the step after batch {before} is followed by one after batch {latest}")

    def ended(self) -> None:
        """The pass came to its end."""
        on_step = self._latest is not None
        if self._expected["ends_early"] and not on_step:
            self._report("there is no step after the last batch")
        self._expected = NOTHING_KNOWN
        self._ends_early = on_step and self._step is not None and self._last - self._step < (self._every or 0)

    def _with(self, gap: int | None) -> int | None:
        """The batches from step to step, one more gap considered."""
        return self._every if gap is None else gap if self._every in (None, gap) else 0

    def _report(self, what: str) -> None:
        self._expected = NOTHING_KNOWN
        logger.warning(
            "not exact: %s: since the resume, the optimizer steps after other batches of the epoch than before: %s; "
            'number the batches with "for number, batch in manager.enumerate(loader)", which continues the count '
            "after a resume",
            self._name,
            what,
        )

    def state_dict(self, number: int | None) -> dict[str, Any]:
        """What a resumed run compares with; ``number``: of the batch at hand, where an optimizer has stepped on it."""
        gap = None if number is None or self._step is None else number - self._step
        every, step = self._with(gap), self._step if number is None else number
        regular = every != 0
        return {
            "every": every if regular else None,
            "step": step if regular else None,
            "ends_early": self._ends_early,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says."""
        self._expected, self._ends_early = state, state["ends_early"]
