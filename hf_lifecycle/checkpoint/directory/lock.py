"""Who else is at work in a directory: another process, which a lock tells, or a save of this one, which is waited for.

Promise: while a process holds a directory, another process is refused and told who holds it. The operating system drops
the lock when its process dies. Within one process the lock is shared, since a notebook's next cell must not be locked
out by the one before. It is a POSIX record lock, not ``flock``: data workers that outlive a killed trainer for a while
must not keep it. :func:`wait_for` returns when no save that this process has announced for a directory is under way.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import platform
import struct
import sys
import threading
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from hf_lifecycle.errors import DirectoryInUse

_CAN_LOCK = find_spec("fcntl") is not None  # not on Windows: two runs in one directory are the user's to avoid there
if _CAN_LOCK:
    import fcntl

__all__ = ["DirectoryLock", "announce", "holder_of", "wait_for"]

logger = logging.getLogger(__name__)

_FLOCK = "hhqqi"  # Linux's struct flock: type, whence, start, length, process

_without_locks: set[Path] = set()  # of which that was said
_held: dict[Path, list[int]] = {}  # [descriptor, holders]. Invariant: one descriptor; closing any drops the lock


class DirectoryLock:
    """Holds ``file``, which is made in an existing directory, while it is entered, or until the process ends."""

    def __init__(self, file: Path) -> None:
        folder = file.parent
        self._file = folder.parent.resolve() / folder.name / file.name

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            DirectoryInUse: Another process has it.
            NotADirectoryError: The folder of the file is a link; what it leads to is not touched.
            OSError: The file is a link, or cannot be written.
        """
        if not _CAN_LOCK:
            return
        if self._file in _held:
            _held[self._file][1] += 1
            return
        if self._file.parent.is_symlink():
            raise NotADirectoryError(
                errno.ENOTDIR, "a symbolic link, which is not followed; remove it", str(self._file.parent)
            )
        descriptor = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 4096)
            os.close(descriptor)
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise DirectoryInUse(self._file.parent.parent, _describe(holder)) from None
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                if self._file not in _without_locks:
                    _without_locks.add(self._file)
                    logger.warning(
                        "%s: this file system has no locks (%s), so a second run in this directory would not be "
                        "refused; make sure that there is only one",
                        self._file.parent.parent,
                        error.strerror,
                    )
                return
            raise
        _held[self._file] = [descriptor, 1]
        facts = {"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(facts).encode(), 0)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two processes lock two files of one name."""
        held = _held.get(self._file)
        if held is None:
            return
        held[1] -= 1
        if held[1] == 0:
            os.close(held[0])
            del _held[self._file]


def holder_of(file: Path) -> str | None:
    """Which other process holds the lock ``file``; None if none does, or if this system does not say. Takes no lock."""
    if not _CAN_LOCK or sys.platform != "linux" or file.parent.is_symlink():
        return None
    if file.parent.parent.resolve() / file.parent.name / file.name in _held:  # closing a descriptor would drop it
        return None
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))[0]
        return None if kind == fcntl.F_UNLCK else _describe(os.read(descriptor, 4096))
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _describe(holder: bytes) -> str:
    try:
        facts = json.loads(holder)
        return f"process {facts['pid']} on {facts['host']}, since {facts['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


_under_way: list[tuple[Path, threading.Event]] = []
_turn = threading.Lock()


def announce(directory: Path) -> Callable[[], None]:
    """Say that a save into ``directory`` is under way, until what this returns is called."""
    save = Path(os.path.realpath(directory)), threading.Event()
    with _turn:
        _under_way.append(save)

    def done() -> None:
        with _turn:
            _under_way.remove(save)
        save[1].set()

    return done


def wait_for(directory: str | os.PathLike[str]) -> None:
    """Wait for the saves into ``directory`` that are under way in other threads of this process."""
    wanted = Path(os.path.realpath(directory))
    with _turn:
        ends = [end for where, end in _under_way if where == wanted]
    for end in ends:
        end.wait()
