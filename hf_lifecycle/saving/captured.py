"""A save that is written, or proved, after its moment: its record, and the order in which it is completed.

Promise: :func:`write_and_commit` and :func:`prove_and_commit` run on the writer's thread: no accelerator, no exchange
with other ranks, no random number. Nothing is committed of a snapshot that was torn. What goes wrong is told to the
event log, and what was written is removed; what was committed before is untouched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.checkpoint.files.durable import flush
from hf_lifecycle.messages import few
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.snapshots.snapshot import Snapshot

__all__ = [
    "Captured",
    "GiveUp",
    "Provable",
    "Save",
    "SnapshotTorn",
    "WrittenSave",
    "prove_and_commit",
    "write_and_commit",
]

logger = logging.getLogger("hf_lifecycle")

GiveUp = Callable[[BaseException], object]


class Provable(Protocol):
    """A file that a host has written, and how to compare it with what it was made of.

    ``run`` gives the file as a manifest lists it, if this rank has read all of it.
    """

    @property
    def name(self) -> str: ...

    def run(self, folder: Path, digests: Mapping[str, str]) -> FileEntry | None: ...


class SnapshotTorn(Exception):
    """Tensors changed while they were copied; nothing was committed."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        super().__init__(f"{few(names)} changed between the save and the next optimizer step, while they were copied")


@dataclass(slots=True, kw_only=True)
class Save:
    """The record of one save.

    Attributes:
        asked: When, by the monotonic clock.
        stall: Seconds for which training has waited for it so far.
        known: The files that are on the disk, by path, with their digests.
    """

    step: int
    asked: float
    stall: float = 0.0
    known: dict[str, FileEntry] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class WrittenSave(Save):
    """One whose files the host has written.

    Attributes:
        comparisons: What is still to be proved of them.
        digests: Those of the tensors that they were made of, by name.
        obstacle: Why it cannot be proved, if that was found.
    """

    comparisons: Sequence[Provable] = ()
    digests: Mapping[str, str] = field(default_factory=dict)
    obstacle: NotLearned | None = None
    is_proved: bool = False


@dataclass(slots=True, kw_only=True)
class Captured(Save):
    """One that was captured.

    Attributes:
        seconds: What the writing took, and ``size`` the bytes that were written; once it is written.
    """

    snapshot: Snapshot
    seconds: float = 0.0
    size: int = 0

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
    give_up: GiveUp,
) -> int | SnapshotTorn:
    """Complete a save.

    Args:
        staged: Where it is written.
        write: Writes its files there, and notes in ``save`` what is known of them.
        commit: Commits it. Returns the bytes of the checkpoint.
        tell: Tells one event: its name, the step, and facts by name.
        give_up: Removes what was written.

    Returns:
        The bytes of the checkpoint; or that the snapshot was torn, so that there is none.
    """
    try:
        with _told_and_removed(save, tell, give_up):
            save.snapshot.wait()
            tell("snapshot", save.step, seconds=time.monotonic() - save.asked, bytes=save.snapshot.nbytes)
            began = time.monotonic()
            write()
            save.seconds = time.monotonic() - began
            tell("written", save.step, seconds=save.seconds, bytes=save.size, mb_per_second=save.rate)
            save.require_settled()
            return commit()
    except SnapshotTorn as torn:
        logger.warning("%s: not saved: %s; the save will be repeated", staged.name, torn)
        return torn


def prove_and_commit(
    save: WrittenSave, staged: Path, commit: Callable[[], object], tell: Callable[..., None], give_up: GiveUp
) -> None:
    """Compare what the host has written with what it was made of, and commit it, whatever comes of that.

    Args:
        save: Its record. Where a file holds something else, it says so.
    """
    with _told_and_removed(save, tell, give_up):
        for one in save.comparisons:
            try:
                entry = one.run(staged, save.digests)
            except NotLearned as difference:
                save.obstacle = difference
                break
            if entry is not None:
                save.known[one.name] = entry
        save.is_proved = save.obstacle is None
        save.comparisons = ()  # with what they hold of the optimizer's state
        for name in save.known:
            flush(staged / name)
        commit()


@contextmanager
def _told_and_removed(save: Save, tell: Callable[..., None], give_up: GiveUp) -> Iterator[None]:
    """Where the block fails: the event log is told, and what was written is removed."""
    try:
        yield
    except BaseException as error:
        give_up(error)
        tell("failed", save.step, why=f"{type(error).__name__}: {error}")
        raise
