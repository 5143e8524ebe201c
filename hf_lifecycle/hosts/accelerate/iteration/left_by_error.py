"""Where a loop was when an exception of the program left it.

A program that catches it may save then, for it has nothing newer. The generators of the manager are closed before, as
by ``break``, which ends an epoch: so the place is kept as it was. What the body had not done, and gradients that were
accumulated, no save has: such a checkpoint is told to be not exact, when it is made and when it is resumed from.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from hf_lifecycle.bytecode import is_raising

__all__ = ["BEGINS_AGAIN", "LEFT_BY_ERROR", "LeftByError"]

_LOST = (
    "after an error left the loop, maybe in the middle of a batch: what was left to do of that batch, and gradients "
    "that were accumulated, are lost"
)
LEFT_BY_ERROR = f"saved {_LOST}, and a resumed run continues with the next batch"
BEGINS_AGAIN = f"not exact: training continues with the next batch {_LOST}; for an exact run, call resume() before"


class LeftByError:
    """The place of the last error; none once a loop has gone on."""

    def __init__(self, in_epochs: Callable[[], bool]) -> None:
        self._in_epochs = in_epochs
        self._place: dict[str, Any] | None = None

    def forget(self) -> None:
        """The loop goes on: the program has dealt with it."""
        self._place = None

    def closing(self, place: Callable[[], dict[str, Any]]) -> bool:
        """A generator of the manager is being closed; ``place()`` is where the loop is. Returns whether by an error."""
        frame = sys._getframe(1)
        while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "hf_lifecycle":
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None or not is_raising(frame):
            return False
        if self._place is None:  # else the loop within has told it
            self._place = place()
        return True

    @property
    def place(self) -> dict[str, Any] | None:
        """Where it was, if a save that is made now is of that place: the error is being handled, or all loops left."""
        is_of_it = sys.exc_info()[1] is not None or not self._in_epochs()
        return self._place if is_of_it else None
