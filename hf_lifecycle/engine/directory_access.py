"""A run's directory as its processes see it: one for all, or one for each node, on one file system, held by one run."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.store import hidden_folder, working_folder
from hf_lifecycle.checkpoint.files.durable import make_directories, sync_parents
from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["lock_directory", "require_directories"]

_NOT_WRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_SAVE = 'with Trainer save_strategy="no"'
_SIGHT = 10.0  # seconds that a file system may take to show a file to another machine


@contextlib.contextmanager
def _writing_to(directory: Path) -> Iterator[None]:
    """Around the first writes to the output directory: an error says what cannot be done there, and what to do.

    Raises:
        OSError: Of the same kind and number.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        said = (
            f"{error.strerror}: no checkpoint can be saved in the output directory; choose another one, or {_NO_SAVE}"
        )
        raise OSError(error.errno, said, str(directory)) from error


def lock_directory(directory: Path) -> DirectoryLock:
    """Take the lock of a run's output directory, whose folder is made where it is missing.

    Raises:
        DirectoryInUse: Another process has it.
        OSError: It cannot be written to.
    """
    with _writing_to(directory):
        folder = hidden_folder(directory)
        make_directories(folder)
        sync_parents(directory)  # Trainer made it, and does not flush
        lock = DirectoryLock(folder / "lock")
        lock.acquire()
    return lock


def require_directories(directory: Path, ranks: Ranks, nodes: Nodes) -> None:
    """Find out whether all ranks write to one directory, or each node to its own; call it on all ranks.

    Raises:
        UnsupportedTraining: Ranks that have to share a directory have different paths, or the same path leads to
            different directories; or two nodes that have to have their own share one.
        RankFailed: A rank cannot write there; on that rank it is an ``OSError``.
    """
    if ranks.world_size == 1:
        return
    told = ranks.gather([str(directory), f"probe-{uuid.uuid4().hex}"], what="comparing output directories")
    if any(path != told[nodes.leader_of(rank)][0] for rank, (path, _) in enumerate(told)):
        problems = [f"rank {rank} has the output directory {path}" for rank, (path, _) in enumerate(told)]
        raise UnsupportedTraining(
            problems,
            "give every rank of a node the same one"
            if nodes.several
            else "give every rank the same one; where nodes share no disk, set save_on_each_node=True",
        )
    name = told[0][1]
    own = None
    try:
        with ranks.agree(what="writing to the output directory"), _writing_to(directory):
            # What a kill leaves there, the next recovery clears.
            own = working_folder(directory, "removed") / f"{name}-{ranks.rank}"
            own.write_bytes(b"")
        sees = _comes_in_sight(own.with_name(f"{name}-{nodes.leader}"))
        strange = [rank for rank in nodes.leaders if own.with_name(f"{name}-{rank}").exists() and rank != nodes.leader]
        view = [platform.node(), sees, strange]
        views = ranks.gather(view, what="looking for another rank's file in the output directory")
    finally:
        if own is not None:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    _require_as_meant([path for path, _ in told], views, nodes)


def _require_as_meant(paths: Sequence[str], views: Sequence[Sequence[Any]], nodes: Nodes) -> None:
    """Raise where a rank does not see its leader's file, or one leader that of another; the same on every rank."""
    blind = {rank: nodes.leader_of(rank) for rank, (_, sees, _) in enumerate(views) if not sees}
    if blind:
        raise UnsupportedTraining(
            [
                f"{paths[leader]} on rank {leader} ({views[leader][0]}) is not the same directory as on rank {rank} on "
                f"{views[rank][0]}"
                for rank, leader in blind.items()
            ],
            "use a directory on a disk that all nodes share, or save_on_each_node=True, with which each node writes "
            "its own",
        )
    pairs = [(rank, other) for rank, (_, _, strange) in enumerate(views) for other in strange if rank in nodes.leaders]
    if pairs:
        raise UnsupportedTraining(
            [f"ranks {rank} and {other} share {paths[rank]}, and would both write to it" for rank, other in pairs],
            "leave save_on_each_node out where nodes share a disk, or give each node a directory of its own",
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
