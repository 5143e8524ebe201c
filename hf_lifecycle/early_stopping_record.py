"""What early stopping has seen so far, and the reading of numbers from users and files.

Promise: what is read here is a plain, checked value, or a ``ValueError`` names what it should have been. Nothing is
decided here.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hf_lifecycle.errors import StateMismatch

__all__ = [
    "Record",
    "Snapshot",
    "read_choice",
    "read_finite",
    "read_flag",
    "read_limit",
    "read_number",
    "read_position",
]


def read_number(name: str, value: object) -> float:
    """``value`` as a plain int or float; Python and NumPy scalars and one-element tensors are numbers.

    Raises:
        ValueError: It is anything else (also a bool); the message names ``name``.
    """
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item"):
        if math.prod(shape) != 1:
            raise ValueError(f"{name} must be a single number, got an array of shape {tuple(shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        as_float = float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a double, got an integer that is too large") from None
    return int(value) if isinstance(value, numbers.Integral) else as_float


def read_finite(name: str, value: object, *, minimum: float = -math.inf, whole: bool = False) -> float:
    """``value`` as a finite number, where asked for not below ``minimum`` or an int."""
    number = read_number(name, value)
    if not math.isfinite(number) or number < minimum or (whole and not isinstance(number, int)):
        wanted = ("a whole number" if whole else "a finite number") + (f" >= {minimum}" if minimum > -math.inf else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


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


def read_choice(name: str, value: object, allowed: tuple[Any, ...]) -> Any:
    """``value``, which must be one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")
    return value


def read_flag(name: str, value: object) -> bool:
    """``value``, which must be a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return value


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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A record as it is saved: with the unit of its positions and, where a clock runs, the seconds on it."""

    record: Record
    unit: str
    elapsed: float | None

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; NaN and infinity are floats."""
        return asdict(self.record) | {"progress_unit": self.unit, "elapsed_seconds": self.elapsed}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any], unit: str) -> Snapshot:
        """Read and check a state, ours or the original project's; positions in another unit than ``unit`` go.

        Raises:
            StateMismatch: Keys are missing or unknown.
            ValueError: A value is not what its key holds.
        """
        if not isinstance(state, Mapping):
            raise ValueError(f"state must be a dict that state_dict() gave, got {type(state).__name__}")
        keys = set(state)
        if keys not in (_KEYS, _KEYS_BEFORE, _ORIGINAL_KEYS):
            raise StateMismatch("EarlyStopping", sorted(_KEYS - keys), sorted(map(str, keys - _KEYS)))
        plain = dict(state)
        same_unit = plain.pop("progress_unit", None) == unit
        elapsed = plain.pop("elapsed_seconds", None)
        if not same_unit:
            plain |= dict.fromkeys(_POSITIONS)
            elapsed = None
        return cls(
            _read_record(plain), unit, None if elapsed is None else read_finite("elapsed_seconds", elapsed, minimum=0)
        )


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
