"""What early stopping would have done to a run that is over, as plain values: what is drawn, and what is printed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ReplayRecord"]


@dataclass(frozen=True, slots=True, repr=False)
class ReplayRecord:
    """What early stopping would have done to a run.

    Attributes:
        metric: The name of the metric in the log.
        settings: The arguments of the early stopping that was asked.
        stopped_at: The optimizer step at which it would have stopped; None if it would not have.
        epoch: The epoch there, where the log has it.
        reason: Why it would have stopped, None if it would not have.
        best_metric: The best metric that counted up to the stop, None if none did.
        best_step: The step of it.
        evaluations: How many evaluations it would have seen, up to the stop.
        steps: The steps of all evaluations of the run, those after the stop too.
        values: Their metrics.
        bests: The best that counted after each; None where none had, and the last one's after the stop.
        targets: What the next evaluation had to be better than to count, after each; infinite where any number would.
    """

    metric: str
    settings: Mapping[str, Any]
    stopped_at: int | None
    epoch: float | None
    reason: str | None
    best_metric: float | None
    best_step: int | None
    evaluations: int
    steps: tuple[int, ...]
    values: tuple[float, ...]
    bests: tuple[float | None, ...]
    targets: tuple[float, ...]

    @property
    def saved_steps(self) -> int:
        """How many optimizer steps, up to the run's last evaluation, would not have been made."""
        return 0 if self.stopped_at is None else self.steps[-1] - self.stopped_at

    @property
    def improvements(self) -> tuple[int, ...]:
        """Which evaluations counted: one is always strictly better than the last that did, so the best moved there."""
        before = (None, *self.bests)
        return tuple(index for index in range(self.evaluations) if self.bests[index] != before[index])

    @property
    def missed(self) -> tuple[int, float] | None:
        """Step and value of the best metric after the stop, if it is better than all before; else None."""
        before = self._best_of(range(self.evaluations))
        after = self._best_of(range(self.evaluations, len(self.values)))
        if after is None or (before is not None and not self._sign * after[1] < self._sign * before[1]):
            return None
        return after

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self}>"

    def __str__(self) -> str:
        best = "no best" if self.best_step is None else f"best {self.best_metric:.6g} at step {self.best_step}"
        if self.stopped_at is None:
            return f"{self.metric}: would not have stopped in {self.evaluations} evaluations; {best}"
        later = "nothing better came later"
        if self.missed is not None:
            later = f"a better {self.missed[1]:.6g} came at step {self.missed[0]}"
        return (
            f"{self.metric}: would have stopped at step {self.stopped_at} of {self.steps[-1]} "
            f"({self.reason}); {best}; {later}"
        )

    @property
    def _sign(self) -> int:
        return 1 if self.settings["mode"] == "min" else -1

    def _best_of(self, indices: range) -> tuple[int, float] | None:
        numbers = [(self.steps[index], self.values[index]) for index in indices if not math.isnan(self.values[index])]
        return min(numbers, key=lambda point: self._sign * point[1], default=None)
