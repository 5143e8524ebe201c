"""A run's directory as all of its processes see it: one directory, on one file system, held by one run."""

from __future__ import annotations

import contextlib
import os
import platform
import time
import uuid
from pathlib import Path

from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.store import hidden_folder, working_folder
from hf_lifecycle.checkpoint.files.durable import make_directories, sync_parents
from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["lock_directory", "require_one_directory"]

_SIGHT = 10.0  # seconds that a file system may take to show a file to another machine


def lock_directory(directory: Path) -> DirectoryLock:
    """Take the lock of a run's output directory, whose folder is made where it is missing.

    Raises:
        DirectoryInUse: Another process has it.
        OSError: It cannot be written to.
    """
    folder = hidden_folder(directory)
    make_directories(folder)
    sync_parents(directory)  # Trainer made it, and does not flush
    lock = DirectoryLock(folder / "lock")
    lock.acquire()
    return lock


def require_one_directory(directory: Path, ranks: Ranks) -> None:
    """Find out whether every rank writes to the same directory; call it on all of them.

    Raises:
        UnsupportedTraining: They have different paths, or the same path leads to different directories.
        RankFailed: A rank cannot write there; on that rank it is an ``OSError``.
    """
    if ranks.world_size == 1:
        return
    told = ranks.gather([str(directory), f"probe-{uuid.uuid4().hex}"], what="comparing output directories")
    if len({path for path, _ in told}) > 1:
        problems = [f"rank {rank} has the output directory {path}" for rank, (path, _) in enumerate(told)]
        raise UnsupportedTraining(problems, "give every rank the same one")
    name = told[0][1]
    own = None
    try:
        with ranks.agree(what=f"writing to {directory}"):
            # What a kill leaves there, the next recovery clears.
            own = working_folder(directory, "removed") / f"{name}-{ranks.rank}"
            own.write_bytes(b"")
        seen = own.with_name(f"{name}-0")
        views = ranks.gather([platform.node(), _comes_in_sight(seen)], what=f"looking for rank 0's file in {directory}")
    finally:
        if own is not None:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(views) if not sees]
    if blind:
        raise UnsupportedTraining(
            [f"{directory} on rank 0 ({views[0][0]}) is not the same directory as on {', '.join(blind)}"],
            "use a directory on a disk that all nodes share, or save_on_each_node=True of Trainer, with which each "
            "node writes its own",
        )


def _comes_in_sight(file: Path) -> bool:
    """Whether the file is there, or comes to be in the time that a network file system may take."""
    deadline = time.monotonic() + _SIGHT
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(file.parent)  # makes such a file system look again
        time.sleep(0.1)
    return True
