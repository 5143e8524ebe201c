"""Which checkpoints are kept, as values: a policy says what to keep of what there is, and touches nothing.

``doomed = infos - policy.keep(infos)`` decides, and then ``remove(doomed)`` acts. The newest checkpoint is always kept,
and so is whatever the caller protects: the best one, the one resumed from.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

__all__ = ["CheckpointInfo", "KeepLast", "RetentionPolicy", "doomed"]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A checkpoint as retention sees it: its step and its directory. Steps give the order, never mtimes."""

    step: int
    path: Path


class RetentionPolicy(Protocol):
    """Chooses what to keep."""

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """What is kept of ``infos``, which are sorted by step, oldest first."""


@dataclass(frozen=True, slots=True)
class KeepLast:
    """Keep the last ``count`` checkpoints; what is protected is kept beside them."""

    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: at least 1 checkpoint is kept, got {self.count}")

    def keep(self, infos: Sequence[CheckpointInfo]) -> set[CheckpointInfo]:
        """The last ``count``."""
        return set(infos[-self.count :])


def doomed(
    infos: Collection[CheckpointInfo], policy: RetentionPolicy, protected: Collection[Path] = ()
) -> list[CheckpointInfo]:
    """What ``policy`` does not keep of ``infos``, oldest first, less the newest and what is ``protected``."""
    ordered = sorted(infos, key=lambda info: info.step)
    safe = {path.resolve() for path in protected}
    kept = policy.keep(ordered) | {info for info in ordered if info.path.resolve() in safe} | set(ordered[-1:])
    return [info for info in ordered if info not in kept]
