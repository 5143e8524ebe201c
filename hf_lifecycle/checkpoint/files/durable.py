"""Files that are wholly old or wholly new, whatever breaks: every write of this package goes through here.

Not promised: that a file written twice at once by two processes holds both (the later rename wins), and atomic
renames on file systems that have none (FUSE, object stores). A process that is killed while writing leaves a hidden
``.NAME.XXXXXXXX.tmp`` beside the target; nothing reads it and it may be removed at any time.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO

__all__ = ["flush", "make_directories", "sync_directory", "sync_parents", "write_atomically"]

logger = logging.getLogger(__name__)

# What a file system answers that has no way to flush a directory; every other answer is a failed write.
_CANNOT_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS})


def write_atomically(path: str | os.PathLike[str], writer: Callable[[IO[bytes]], object]) -> None:
    """Let ``writer`` fill a new file and put it in the place of ``path`` once all of it is on the disk.

    The new file gets the permissions of any new file (the umask decides). Where ``path`` is a symbolic link, the
    link stays and the file that it names is replaced.

    Args:
        path: The file to write. Its directory exists.
        writer: Writes the whole content to the binary file that it is given.

    Raises:
        OSError: The disk is full, the directory is missing or may not be written to, and the like, with the name of
            the file. What ``path`` held before is untouched and the unfinished file is removed. Only where the last
            step, flushing the directory, fails, the new file is in place already.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        _refuse_what_is_no_file(target)
        try:
            _write_and_sync(temporary, writer)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        sync_directory(target.parent)
    except OSError as error:
        # A failed write(2) names no file, and the temporary name would tell the user nothing.
        error.filename = os.fspath(path)
        del error.filename2  # None would be told: "-> None"
        raise


def flush(path: str | os.PathLike[str]) -> None:
    """Wait until the bytes of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories(path: str | os.PathLike[str]) -> None:
    """Create a directory and the parents it lacks, so that they outlive a power cut; one that exists is left alone."""
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def sync_parents(path: str | os.PathLike[str]) -> None:
    """Flush every folder above a directory, whoever made them: a checkpoint is as durable as the way to it.

    A folder that cannot be flushed is a warning: whoever writes into the directory finds out what is wrong.
    """
    above = {*Path(os.path.realpath(path)).parents, *Path(os.path.abspath(path)).parents}
    for folder in sorted(above, key=lambda one: -len(one.parts)):
        try:
            sync_directory(folder)
        except OSError as error:
            logger.warning(
                "%s: could not be flushed to disk (%s), so a power failure may lose it",
                folder,
                error.strerror or error,
            )


def sync_directory(path: str | os.PathLike[str]) -> None:
    """Flush a directory, so that a rename in it outlives a power cut, where the file system can do that."""
    if os.name == "nt":  # directories cannot be opened there; NTFS journals the rename itself
        return
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a directory that may be written to but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)


def _write_and_sync(temporary: Path, writer: Callable[[IO[bytes]], object]) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    with open(os.open(temporary, flags, 0o666), "wb") as file:
        writer(file)
        file.flush()
        # Invariant: the bytes are on the disk before the name is; after a power cut the name may outlive them.
        os.fsync(file.fileno())


def _refuse_what_is_no_file(target: Path) -> None:
    """A rename would put a file in the place of a device or a socket."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "not a regular file")
