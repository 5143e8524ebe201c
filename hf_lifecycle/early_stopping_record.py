"""What early stopping has seen so far, read from users and files.

Promise: what is read here is a plain, checked value, or a ``ValueError`` names what it should have been. Nothing is
decided here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from hf_lifecycle.argument_checks import read_finite, read_flag, read_number
from hf_lifecycle.errors import StateMismatch

__all__ = ["Record", "read_limit", "read_position", "read_state"]


def read_limit(name: str, value: object) -> float | None:
    """``value`` as a finite number, or None."""
    return None if value is None else read_finite(name, value)


def read_position(value: object, last: float | None, unit: str) -> float:
    """``value`` as a position in ``unit`` that is not before ``last``."""
    if value is None:
        raise ValueError(f"progress must be given with patience_unit={unit!r}: the position in it")
    position = read_finite("progress", value, minimum=0)
    if last is not None and position < last:
        raise ValueError(
            f"progress must not go backwards, got {position} after {last}; give it at every evaluation or at none"
        )
    return position


@dataclass(frozen=True, slots=True)
class Record:
    """What happened so far. A step makes a new one, so no failure can leave half of one behind."""

    best_metric: float | None = None
    best_progress: float | None = None
    counter: int = 0
    evaluations: int = 0
    improved: bool = False
    metric: float | None = None  # of the last evaluation
    progress: float | None = None
    reason: str | None = None
    should_stop: bool = False
    waiting_since: float | None = None  # the progress from which patience runs

    def before_last(self) -> Record:
        """What there was before the last evaluation, which was no improvement."""
        counted = max(self.counter - 1, 0)
        return replace(self, evaluations=self.evaluations - 1, counter=counted, reason=None, should_stop=False)

    def waited(self, unit: str) -> float:
        """How much of ``unit`` has passed without an improvement; none where its positions are not known."""
        if unit == "evaluations":
            return self.counter
        if self.progress is None or self.waiting_since is None:
            return 0
        return self.progress - self.waiting_since

    def describe_wait(self, settings: Mapping[str, Any]) -> str:
        """The same as a sentence, under the ``settings`` of early stopping."""
        waited, unit, delta = self.waited(settings["patience_unit"]), settings["patience_unit"], settings["min_delta"]
        target = "the best" if self.best_metric is not None else "the baseline"
        value = self.best_metric if self.best_metric is not None else settings["baseline"]
        over = f" on {target}, {value:.6g}," if value is not None else ""
        by = f" by more than {delta:.6g}" + (" of it" if settings["min_delta_mode"] == "relative" else "")
        return f"no improvement{over}{by if delta else ''} in {waited:.6g} {unit[:-1] if waited == 1 else unit}"


_ORIGINAL_KEYS = frozenset({"best_metric", "counter", "should_stop"})
_POSITIONS = ("best_progress", "progress", "waiting_since")
_KEYS = frozenset({*(field.name for field in fields(Record)), "progress_unit", "elapsed_seconds"})
_KEYS_BEFORE = _KEYS - {"metric"}


def read_state(state: Mapping[str, Any], unit: str) -> tuple[Record, float]:
    """Read and check a state, ours or the original project's: the record, and the seconds on its clock.

    Positions in another unit than ``unit`` are dropped.

    Raises:
        StateMismatch: Keys are missing or unknown.
        ValueError: A value is not what its key holds.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"state must be a dict returned by state_dict(), got {type(state).__name__}")
    keys = set(state)
    if keys not in (_KEYS, _KEYS_BEFORE, _ORIGINAL_KEYS):
        raise StateMismatch("EarlyStopping", sorted(_KEYS - keys), sorted(map(str, keys - _KEYS)))
    plain = dict(state)
    same_unit = plain.pop("progress_unit", None) == unit
    elapsed = plain.pop("elapsed_seconds", None)
    if not same_unit:
        plain |= dict.fromkeys(_POSITIONS)
        elapsed = None
    return _read_record(plain), 0.0 if elapsed is None else read_finite("elapsed_seconds", elapsed, minimum=0)


def _read_record(plain: dict[str, Any]) -> Record:
    """The record that ``plain`` holds, every value checked; what the original project did not save is filled in."""

    best = None if plain["best_metric"] is None else float(read_number("best_metric", plain["best_metric"]))
    if best is not None and math.isnan(best):
        best = None  # the original project took a NaN as best, and nothing could beat it
    metric = plain.get("metric")
    counter = int(read_finite("counter", plain["counter"], minimum=0, whole=True))
    should_stop = read_flag("should_stop", plain["should_stop"])
    reason = plain.get("reason")
    if not (reason is None or isinstance(reason, str)):
        raise ValueError(f"reason must be a sentence or None, got {reason!r}")
    known = counter + (best is not None)
    return Record(
        best_metric=best,
        counter=counter,
        evaluations=int(read_finite("evaluations", plain.get("evaluations", known), minimum=0, whole=True)),
        improved=read_flag("improved", plain.get("improved", False)),
        metric=None if metric is None else float(read_number("metric", metric)),
        reason=reason or ("it had stopped before its state was saved" if should_stop else None),
        should_stop=should_stop,
        **{key: None if plain[key] is None else read_finite(key, plain[key], minimum=0) for key in _POSITIONS},
    )
