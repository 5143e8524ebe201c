"""Where a loop is, for its user to read."""

from __future__ import annotations

from hf_lifecycle.hosts.accelerate.iteration.loaders import Loaders
from hf_lifecycle.hosts.accelerate.iteration.steps import Steps

__all__ = ["Progress"]


class Progress:
    """Where a loop is. Read it; the loop moves it.

    Attributes:
        epoch: The epoch at hand, from 0; after the last, their number.
        preempted: The name of the signal that ended the loop last begun, or ``"time limit"``; None where none did.
    """

    def __init__(self, steps: Steps, loaders: Loaders) -> None:
        self.epoch = 0
        self.preempted: str | None = None
        self._steps = steps
        self._loaders = loaders

    @property
    def step(self) -> int:
        """Optimizer steps taken, that on the batch at hand included once it is taken."""
        return self._steps.read()

    @property
    def batch(self) -> int:
        """Batches handed out in the passes that are open; 0 between passes."""
        return self._loaders.batches_in_open_passes

    def __repr__(self) -> str:
        return f"Progress(epoch={self.epoch}, step={self.step}, batch={self.batch})"
