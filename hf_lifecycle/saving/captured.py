"""A save that was captured at one moment and is written later: its record, and the order in which it is completed.

Promise: :func:`write_and_commit` runs on the writer's thread: no accelerator, no exchange with other ranks, no random
number. Nothing is committed of a snapshot that was torn. What goes wrong is told to the event log, and what was written
is removed; what was committed before is untouched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.manifest import FileEntry
from hf_lifecycle.checkpoint.store import discard
from hf_lifecycle.saving.snapshot import Snapshot

__all__ = ["Captured", "SnapshotTorn", "write_and_commit"]

logger = logging.getLogger("hf_lifecycle")


class SnapshotTorn(Exception):
    """Tensors changed while they were copied; nothing was committed.

    Attributes:
        names: Which.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        super().__init__(f"{some} changed between the save and the next optimizer step, while being copied")


@dataclass(slots=True, kw_only=True)
class Captured:
    """The record of one save.

    Attributes:
        step: The optimizer step.
        snapshot: The tensors.
        asked: When, by the monotonic clock.
        stall: Seconds for which training has waited for it so far.
        seconds: What the writing took, and ``size`` the bytes that were written; once it is written.
        known: The files written in blocks, by path.
    """

    step: int
    snapshot: Snapshot
    asked: float
    stall: float = 0.0
    seconds: float = 0.0
    size: int = 0
    known: dict[str, FileEntry] = field(default_factory=dict)

    @property
    def rate(self) -> float | None:
        """Megabytes a second of the writing."""
        return self.size / self.seconds / 1e6 if self.seconds else None

    def require_settled(self) -> None:
        """Raise :class:`SnapshotTorn` unless what was written is of one moment; asked before the commit."""
        if not self.snapshot.settled:
            raise SnapshotTorn(self.snapshot.torn)


def write_and_commit(
    save: Captured,
    staged: Path,
    write: Callable[[], None],
    commit: Callable[[], int],
    tell: Callable[..., None],
) -> int | None:
    """Complete a save.

    Args:
        save: Its record.
        staged: Where it is written.
        write: Writes its files there, and notes in ``save`` what is known of them.
        commit: Commits it. Returns the bytes of the checkpoint.
        tell: Tells one event: its name, the step, and facts by name.

    Returns:
        The bytes of the checkpoint; None where the snapshot was torn, so that there is none.
    """
    try:
        save.snapshot.wait()
        tell("snapshot", save.step, seconds=time.monotonic() - save.asked, bytes=save.snapshot.nbytes)
        began = time.monotonic()
        write()
        save.seconds = time.monotonic() - began
        tell("written", save.step, seconds=save.seconds, bytes=save.size, mb_per_second=save.rate)
        save.require_settled()
        return commit()
    except SnapshotTorn as torn:
        _give_up(save, staged, torn, tell)
        logger.warning("%s: not saved: %s; training saves again as soon as it goes on", staged.name, torn)
        return None
    except BaseException as error:
        _give_up(save, staged, error, tell)
        raise


def _give_up(save: Captured, staged: Path, error: BaseException, tell: Callable[..., Any]) -> None:
    discard(staged)
    tell("failed", save.step, why=f"{type(error).__name__}: {error}")
