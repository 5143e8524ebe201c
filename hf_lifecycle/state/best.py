"""The best metric so far, and the epoch it belongs to.

Promise: a best that was saved and restored judges the next metric as the one that was never interrupted. NaN is never
the best, and an equal metric is no better. Not done here: nothing is stopped; see
:mod:`hf_lifecycle.early_stopping` for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, SupportsFloat

from hf_lifecycle.argument_checks import read_choice, read_finite, read_number
from hf_lifecycle.errors import StateMismatch

__all__ = ["BestMetric", "Mode"]

Mode = Literal["min", "max"]

_KEYS = ("best_metric", "best_epoch", "mode")
_ORIGINAL_KEYS = frozenset({"best_metric", "best_epoch"})


class BestMetric:
    """Keeps the best of the metrics that it is offered.

    A metric that is offered without its epoch gets the epoch of the save it stands next to: of the save just before,
    if no metric was offered since that one; else of the save that follows, and until then it has none. So it is right
    in a loop that saves first and in one that judges first.

    Attributes:
        epoch: Its epoch, or None where it is not known (yet).
        mode: ``"min"`` or ``"max"``, or None before the first metric.
    """

    def __init__(self) -> None:
        self._begin(None, None, None)

    def _begin(self, value: float | None, epoch: float | None, mode: Mode | None) -> None:
        self.value, self.epoch, self.mode = value, epoch, mode
        self._awaits_epoch = False
        self._offered_since_save = False
        self._free_save: float | None = None  # the epoch of a save that no metric has been offered for

    def offer(self, metric: SupportsFloat, mode: Mode, epoch: float | None = None) -> bool:
        """Take one more metric and say whether it is the best so far.

        Raises:
            ValueError: ``mode`` is neither ``"min"`` nor ``"max"``, or not that of the metrics before; ``metric`` is
                not a number. Nothing changed.
        """
        read_choice("mode", mode, ("min", "max"))
        if self.mode not in (None, mode):
            raise ValueError(f"mode was {self.mode!r} for the metrics before and cannot become {mode!r}")
        number = float(read_number("metric", metric))
        at = read_finite("epoch", epoch) if epoch is not None else self._free_save
        self.mode = mode
        if self._free_save is not None:
            self._free_save = None
        else:
            self._offered_since_save = True
        if not self._beats(number):
            return False
        self.value, self.epoch, self._awaits_epoch = number, at, at is None
        return True

    def state_at(self, epoch: float) -> dict[str, Any]:
        """The state that a save of ``epoch`` holds; nothing changes until :meth:`saved`."""
        return self.state_dict() | ({"best_epoch": epoch} if self._awaits_epoch else {})

    def saved(self, epoch: float) -> None:
        """Note that a save of ``epoch`` was made."""
        if self._awaits_epoch:
            self.epoch, self._awaits_epoch = epoch, False
        self._free_save = None if self._offered_since_save else epoch
        self._offered_since_save = False

    def adopt(self, metric: float | None, epoch: float) -> None:
        """Take a best that was saved by hand beside this one, if it is one, or the only one."""
        known_worse = self.value is not None and self.mode is None  # which of two is better, nobody said
        if metric is not None and not known_worse and self._beats(metric):
            self.value, self.epoch, self._awaits_epoch = metric, epoch, False

    def state_dict(self) -> dict[str, Any]:
        """``best_metric``, ``best_epoch`` and ``mode``, as plain values."""
        return {"best_metric": self.value, "best_epoch": self.epoch, "mode": self.mode}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; one of the original project, which has no ``mode``, is taken too.

        Raises:
            StateMismatch: Keys are missing or unknown. Nothing changed.
            ValueError: A value is not what its key holds. Nothing changed.
        """
        keys = set(state)
        if keys not in (set(_KEYS), _ORIGINAL_KEYS):
            raise StateMismatch(
                "the best metric", [key for key in _KEYS if key not in keys], sorted(map(str, keys - {*_KEYS}))
            )
        metric, epoch, mode = state["best_metric"], state["best_epoch"], state.get("mode")
        value = None if metric is None else float(read_number("best_metric", metric))
        place = None if epoch is None else read_finite("best_epoch", epoch)
        chosen = None if mode is None else read_choice("mode", mode, ("min", "max"))
        if value is not None and math.isnan(value):  # the original project took a NaN as best
            value = place = None
        self._begin(value, place, chosen)

    def _beats(self, number: float) -> bool:
        if math.isnan(number):
            return False
        if self.value is None or math.isnan(self.value):
            return True
        return number > self.value if self.mode == "max" else number < self.value
