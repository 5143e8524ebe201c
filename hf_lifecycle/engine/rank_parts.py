"""The parts of one checkpoint that each rank writes on a thread: what each tells of its own, and who waits for all.

For each save there is a folder beside the staging folder, and in it for each rank one file, by whose name it tells::

    rank-1.writing ──┬── rank-1.done      with the size and digest of each file that it has written
                     └── rank-1.failed    with what went wrong, as far as the disk has room for that

Promise: no collective and no store is asked, so the writers' threads may do all this. To tell that something failed
takes no room on the disk. Rank 0 waits for no rank whose process has ended (which is seen on its own machine), and for
none that gives no sign for the time limit: while a part is written, its file is touched. So on several nodes the file
system has to show to one what another writes, within that time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.errors import RankFailed, RankUnreachable
from hf_lifecycle.processes.ended import has_ended, process_mark
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.captured import SnapshotTorn

__all__ = ["Part", "RankParts"]

_LONGEST_BEAT = 5.0  # seconds between two signs
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1  # seconds between two looks
_ROOM = 4096
_WRITING, _DONE, _FAILED = "writing", "done", "failed"


class Part(NamedTuple):
    """What one rank has written.

    Attributes:
        files: Its files, on the disk.
        facts: What the host adds.
    """

    files: tuple[FileEntry, ...]
    facts: Mapping[str, Any]


class RankParts:
    """The parts of one save, as one rank sees them.

    Args:
        folder: Where ranks tell; made anew by rank 0 when the save is staged.
        what: The checkpoint, for messages.

    Attributes:
        is_handed_over: Whether a thread closes it.
    """

    def __init__(self, folder: Path, what: str, ranks: Ranks) -> None:
        self._folder = folder
        self._what = what
        self._rank = ranks.rank
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._timeout = ranks.timeout
        self._every = min(_LONGEST_BEAT, ranks.timeout / 5)
        self.is_handed_over = False
        self._silent: list[int] = []
        self._over = threading.Event()
        self._beats: threading.Thread | None = None
        self._descriptor = -1  # of this rank's file

    def _file(self, rank: int, state: str) -> Path:
        return self._folder / f"rank-{rank}.{state}"

    def left_by(self, rank: int) -> Path:
        """Where a rank leaves the bytes of its part, if it is another rank that writes them into the checkpoint."""
        return self._file(rank, "bytes")

    # On the main thread

    def begin(self) -> None:
        """This rank's part is going to be written; on the main thread.

        Raises:
            OSError: That cannot be told.
        """
        if self._rank == 0:  # whom nobody waits for here
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        unseen = self._folder / f".rank-{self._rank}"
        self._descriptor = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._put(process_mark().ljust(_ROOM))  # where the disk is full later, this much can be told
        unseen.rename(self._file(self._rank, _WRITING))
        thread = threading.Thread(target=self._beat, name="hf_lifecycle-part", daemon=True)
        with contextlib.suppress(RuntimeError):  # no more threads: the others wait for as long as the limit
            thread.start()
            self._beats = thread

    def _put(self, text: str) -> None:
        """Write to this rank's file, in the room that it has taken."""
        data = text.encode()
        os.pwrite(self._descriptor, data, 0)
        os.ftruncate(self._descriptor, len(data))

    def _beat(self) -> None:
        while not self._over.wait(self._every):
            with contextlib.suppress(OSError):
                os.utime(self._file(self._rank, _WRITING))

    # On the writer's thread

    def done(self, files: Iterable[FileEntry], facts: Mapping[str, Any]) -> None:
        """Tell that this rank's part is on the disk.

        Raises:
            OSError: That cannot be told.
        """
        entries = [[entry.path, entry.size, entry.xxh3_128] for entry in files]
        self._put(json.dumps({"files": entries, "facts": facts}))
        self._file(self._rank, _WRITING).rename(self._file(self._rank, _DONE))

    def failed(self, error: BaseException) -> None:
        """Tell that it is not. What cannot be told is found by the others' time limit."""
        if self._descriptor < 0:  # it has not begun, or was told
            return
        torn = error.names if isinstance(error, SnapshotTorn) else None
        text = json.dumps({"error": f"{type(error).__name__}: {error}", "torn": torn})
        with contextlib.suppress(OSError):
            self._put(text)
        with contextlib.suppress(OSError):
            self._file(self._rank, _WRITING).rename(self._file(self._rank, _FAILED))

    def abandon(self, error: BaseException) -> None:
        """The save is given up, on the main thread; nothing is left to do where no thread has begun with it."""
        if not self.is_handed_over:
            self.failed(error)
            self.close()

    def close(self) -> None:
        """This rank's part is written, or is not going to be; or all parts are, where this is rank 0."""
        self._over.set()
        if self._beats is not None:
            self._beats.join()
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def wait(self) -> dict[int, Part]:
        """Wait for the parts of all other ranks.

        Raises:
            RankFailed: Some could not write theirs, or their process has ended.
            RankUnreachable: Some gave no sign for the time limit.
            SnapshotTorn: The snapshots of some were.
        """
        parts, failed, silent = self._ends()
        self._silent = silent
        if any(one["torn"] is None for one in failed.values()):
            causes = {rank: one["error"] for rank, one in failed.items() if one["torn"] is None}
            raise RankFailed(f"writing {self._what}", causes)
        if silent:
            raise RankUnreachable(f"writing {self._what}", silent, self._timeout)
        if failed:
            raise SnapshotTorn([f"rank {rank}: {name}" for rank, one in failed.items() for name in one["torn"]])
        return parts

    def wait_for_end(self) -> bool:
        """Wait until no other rank writes any more. Returns whether that is known of all of them."""
        return not (self._silent or self._ends()[2])

    def remove(self) -> None:
        """Nobody asks any more."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _ends(self) -> tuple[dict[int, Part], dict[int, Any], list[int]]:
        """Of each other rank its part, what it tells of a failure, or that nothing is known of it."""
        parts: dict[int, Part] = {}
        failed: dict[int, Any] = {}
        silent: list[int] = []
        began = time.monotonic()
        heard, signs = dict.fromkeys(self._others, began), dict.fromkeys(self._others, 0)
        while missing := [rank for rank in self._others if rank not in parts and rank not in failed]:
            missing = [rank for rank in missing if rank not in silent]
            if not missing:
                break
            for rank in missing:
                if (told := _read(self._file(rank, _DONE))) is not None:
                    parts[rank] = Part(tuple(FileEntry(*entry) for entry in told["files"]), told["facts"])
                elif self._file(rank, _FAILED).exists():
                    unknown = {"error": "it wrote neither its part nor an error", "torn": None}
                    failed[rank] = _read(self._file(rank, _FAILED)) or unknown
                elif (sign := _sign(self._file(rank, _WRITING))) != signs[rank]:
                    heard[rank], signs[rank] = time.monotonic(), sign
                elif _has_ended(self._file(rank, _WRITING)):
                    failed[rank] = {"error": "its process has ended", "torn": None}
                elif time.monotonic() - heard[rank] >= self._timeout:
                    silent.append(rank)
            time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, (time.monotonic() - began) / 10)))
        return parts, failed, silent


def _read(file: Path) -> Any:
    """What a rank tells in a file; None where there is none, or nothing that can be read."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def _sign(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _has_ended(file: Path) -> bool:
    """Whether the process that has made the file ran on this machine, and ended before it told anything."""
    try:
        mark = file.read_text(errors="replace")
    except OSError:
        return False
    # Invariant: a rank's file is renamed before its process ends, where that has told anything. Until then it may have
    # what is told, which is no mark.
    return len(mark.split()) == 3 and has_ended(mark) and file.exists()
