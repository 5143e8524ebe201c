"""Which checkpoints to keep, as values: a policy chooses from a list of checkpoints, and touches nothing.

``doomed(infos, policy, protected)`` decides, and then the caller removes. The newest checkpoint is always kept, and so
is whatever the caller protects: the best one, the one just committed, and, where the newest may be damaged, the newest
that verifies.

Applied after every commit or once at the end, a policy made of these keeps the same, whatever the newest was in
between; only :class:`KeepBest` cannot know that a better one would come.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Literal

from hf_lifecycle.argument_checks import read_choice

__all__ = [
    "AnyOf",
    "CheckpointInfo",
    "KeepBest",
    "KeepEveryHours",
    "KeepEverySteps",
    "KeepLast",
    "RetentionPolicy",
    "doomed",
]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint as retention sees it. Steps give the order, never the files' times.

    Attributes:
        step: Optimizer steps done.
        path: Its directory.
        metric: The metric of an evaluation at this step; None if there was no such evaluation, or the checkpoint has
            no manifest.
        created: When it was committed, with a time zone; None where it has no manifest.
    """

    step: int
    path: Path
    metric: float | None = None
    created: datetime | None = None


class RetentionPolicy(ABC):
    """Chooses what to keep. ``a | b`` keeps what either keeps. Subclass it for your own policy."""

    __slots__ = ()

    @abstractmethod
    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The checkpoints to keep of ``infos``, which are sorted by step, oldest first."""

    def __or__(self, other: RetentionPolicy) -> AnyOf:
        if not isinstance(other, RetentionPolicy):
            return NotImplemented
        return AnyOf((*_alternatives(self), *_alternatives(other)))


@dataclass(frozen=True, slots=True)
class KeepLast(RetentionPolicy):
    """Keep the last ``count`` checkpoints, besides protected ones."""

    count: int

    def __post_init__(self) -> None:
        _check_count("count", self.count)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The last ``count``."""
        return set(infos[-self.count :])


@dataclass(frozen=True, slots=True)
class KeepBest(RetentionPolicy):
    """Keep the ``count`` checkpoints with the lowest (``mode="min"``) or highest (``"max"``) metric.

    Of equal metrics, the earlier one is better. NaN is never the best, and a checkpoint without a metric is not kept.
    """

    count: int
    mode: Literal["min", "max"]

    def __post_init__(self) -> None:
        _check_count("count", self.count)
        read_choice("mode", self.mode, ("min", "max"))

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The ``count`` best of those that have a metric."""
        sign = 1.0 if self.mode == "min" else -1.0
        judged = [
            (sign * info.metric, info.step, info)
            for info in infos
            if info.metric is not None and not math.isnan(info.metric)
        ]
        return {info for *_, info in sorted(judged, key=lambda entry: entry[:2])[: self.count]}


@dataclass(frozen=True, slots=True)
class KeepEverySteps(RetentionPolicy):
    """Keep the first checkpoint at or after each multiple: of 37, 74, 111, 148, … with ``steps=100`` 111, 222, …"""

    steps: int

    def __post_init__(self) -> None:
        _check_count("steps", self.steps)

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The first of each interval from one multiple to the next; none before the first multiple."""
        firsts: dict[int, CheckpointInfo] = {}
        for info in infos:
            firsts.setdefault(info.step // self.steps, info)
        return {info for multiple, info in firsts.items() if multiple > 0}


@dataclass(frozen=True, slots=True)
class KeepEveryHours(RetentionPolicy):
    """Keep the first checkpoint, and then each that is at least ``hours`` from the last one kept.

    Hours of the wall clock, between the commit times in the manifests; checkpoints without manifest are not kept. If
    the clock is set back, the difference counts as time passed.
    """

    hours: float

    def __post_init__(self) -> None:
        if isinstance(self.hours, bool) or not isinstance(self.hours, (int, float)):
            raise TypeError(f"hours must be a number, got {self.hours!r}")
        if not (math.isfinite(self.hours) and self.hours > 0):
            raise ValueError(f"hours must be more than 0, got {self.hours}")

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """A chain of checkpoints, from the oldest on, whose neighbours are ``hours`` apart or more."""
        apart = timedelta(hours=self.hours)
        kept: set[CheckpointInfo] = set()
        last: datetime | None = None
        for info in infos:
            if info.created is not None and (last is None or abs(info.created - last) >= apart):
                kept.add(info)
                last = info.created
        return kept


@dataclass(frozen=True, slots=True)
class AnyOf(RetentionPolicy):
    """Keep what any of ``policies`` keeps; the result of ``KeepLast(2) | KeepBest(3, "max")``."""

    policies: tuple[RetentionPolicy, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "policies", tuple(self.policies))  # frozen, and any sequence is welcome
        if not self.policies:
            raise ValueError("policies: give at least one")
        for policy in self.policies:
            if not isinstance(policy, RetentionPolicy):
                raise TypeError(f"policies must be RetentionPolicy objects, got {policy!r}")

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The union of what each keeps."""
        return {info for policy in self.policies for info in policy.keep(infos)}


def doomed(
    infos: Collection[CheckpointInfo], policy: RetentionPolicy, protected: Collection[Path] = ()
) -> list[CheckpointInfo]:
    """What ``policy`` does not keep of ``infos``, oldest first, less the newest and what is ``protected``."""
    ordered = sorted(infos, key=lambda info: info.step)
    safe = {path.resolve() for path in protected}
    kept = policy.keep(ordered) | {info for info in ordered if info.path.resolve() in safe} | set(ordered[-1:])
    return [info for info in ordered if info not in kept]


def _alternatives(policy: RetentionPolicy) -> tuple[RetentionPolicy, ...]:
    return policy.policies if isinstance(policy, AnyOf) else (policy,)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if int(value) < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
