"""Regular files, read with a bound: a pipe, a socket or a device that bears a file's name never blocks.

Not promised: that a file does not change while it is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import xxhash

__all__ = ["digest_file", "digest_of", "leads_nowhere_else", "open_regular", "read_bounded", "read_json", "walk"]

_BLOCK = 4 << 20


def digest_file(path: Path, advance: Callable[[int], None] = lambda _: None) -> str:
    """The XXH3-128 of a file's bytes, 32 hexadecimal digits; ``advance`` is told of every block that was read."""
    with open_regular(path) as file:
        return digest_of(file, advance)


def digest_of(file: IO[bytes], advance: Callable[[int], None] = lambda _: None) -> str:
    """As :func:`digest_file`, of what is left of an open file."""
    digest = xxhash.xxh3_128()
    while block := file.read(_BLOCK):
        digest.update(block)
        advance(len(block))
    return digest.hexdigest()


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading, unbuffered; what is no file never blocks.

    Raises:
        OSError: It cannot be opened, or is a pipe, a socket, a device or a directory.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return open(descriptor, "rb", buffering=0)
    except BaseException:
        os.close(descriptor)
        raise


def read_bounded(path: Path, most: int = 256 << 20) -> bytes:
    """The content of a file of at most ``most`` bytes; what is no file never blocks.

    Raises:
        OSError: It cannot be read, or is no file.
        ValueError: It is larger.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size > most:
            raise ValueError(f"{path}: larger than {most >> 20} MiB")
        return file.read(most)


def read_json(path: Path, most: int = 256 << 20) -> Any:
    """The content of a JSON file, read by :func:`read_bounded`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or very large.
        RecursionError: It is nested too deep.
    """
    return json.loads(read_bounded(path, most))


def walk(folder: Path) -> Iterator[Path]:
    """Every path below ``folder`` that is no folder itself; links to folders are not followed.

    Raises:
        OSError: A folder cannot be read. ``os.walk`` would leave it out.
    """

    def refuse(error: OSError) -> None:
        raise error

    return (Path(place) / name for place, _, names in os.walk(folder, onerror=refuse) for name in names)


def leads_nowhere_else(checkpoint: Path, path: Path) -> bool:
    """Whether ``path``, with every link on the way followed, lies in ``checkpoint``."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(checkpoint))
