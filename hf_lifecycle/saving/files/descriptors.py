"""Descriptors that are written to past the page cache, or through it where a file system refuses; said once."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["ALIGNMENT", "open_direct", "write_whole"]

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

ALIGNMENT = 4096
_NO_DIRECT_WRITES = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_said = threading.Event()


def open_direct(path: Path) -> int:
    """A descriptor of a new file; writes to it pass the page cache by where the file system can.

    Raises:
        OSError: It cannot be made, or is there already.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    direct = getattr(os, "O_DIRECT", 0)
    if direct:
        try:
            return os.open(path, flags | direct, 0o666)
        except OSError as error:
            if error.errno not in _NO_DIRECT_WRITES:
                raise
            with contextlib.suppress(FileNotFoundError):  # some file systems create it before they refuse
                os.unlink(path)
    _say_no_direct_writes(path)
    return os.open(path, flags, 0o666)


def write_whole(descriptor: int, data: Bytes) -> None:
    """Append all of ``data``, whose address and size are multiples of :data:`ALIGNMENT`.

    Raises:
        OSError: It cannot be written.
    """
    while data.size:
        try:
            written = os.write(descriptor, data.data)
        except OSError as error:
            if error.errno not in _NO_DIRECT_WRITES or not _stop_writing_directly(descriptor):
                raise
            continue
        data = data[written:]


def _stop_writing_directly(descriptor: int) -> bool:
    """Whether the file was written to directly until now."""
    direct = getattr(os, "O_DIRECT", 0)
    if not direct:
        return False
    import fcntl  # where there are direct writes, there is this

    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if not flags & direct:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~direct)
    _say_no_direct_writes(None)
    return True


def _say_no_direct_writes(path: Path | None) -> None:
    if not _said.is_set():
        _said.set()
        logger.debug("%s: this file system has no direct writes, so background saves use the page cache", path)
