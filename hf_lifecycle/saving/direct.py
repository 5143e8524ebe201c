"""Files written past the page cache, in large aligned blocks, with their digest taken as the bytes go by.

Promise: when :meth:`Blocks.file` has ended without an error, all bytes of that file are on the disk, and what it gave
is their size and digest. Where a file system has no direct writes, they go through the page cache; that is logged
once. Not promised: that the name outlives a power cut; the folder is flushed by who commits it.

One thread fills a block while another writes the one before. That thread is started when :class:`Blocks` is made, so
that a save which is under way when the interpreter ends needs no new one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from hf_lifecycle.saving.image import address
from hf_lifecycle.saving.memory import host_memory

__all__ = ["Blocks", "DigestSink", "WrittenFile"]

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

_ALIGNMENT = 4096
_NO_DIRECT_WRITES = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})
_said = threading.Event()


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """What was written.

    Attributes:
        size: Bytes.
        xxh3_128: Their digest, in hexadecimal.
    """

    size: int
    xxh3_128: str


class DigestSink:
    """Takes bytes and keeps their number and digest alone."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = xxhash.xxh3_128()

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        self._digest.update(data)  # type: ignore[arg-type]
        self.size += len(data)

    def written(self) -> WrittenFile:
        """What was taken so far."""
        return WrittenFile(self.size, self._digest.hexdigest())


class Blocks:
    """Writes files one after the other; close it when done.

    Args:
        block: Bytes of one block, a multiple of 4096.
        count: Number of blocks; with two, one is filled while the other is written.
    """

    def __init__(self, *, block: int = 8 << 20, count: int = 2) -> None:
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, Bytes, Bytes] | None] = queue.SimpleQueue()
        memory = host_memory(block * count)[0].numpy()
        for number in range(count):
            self._free.put(memory[number * block : (number + 1) * block])
        self.size = block
        self._count = count
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._write_blocks, name="hf_lifecycle-blocks")
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._full.put(None)
        self._thread.join()

    @contextlib.contextmanager
    def file(self, path: Path, image: Bytes | None = None) -> Iterator[_BlockFile | _ImageFile]:
        """A new file to write to; when the block ends, it is whole and flushed.

        Args:
            path: Where.
            image: Memory that is laid out like the file, longer up to a multiple of 4096 bytes. What is written and
                lies there already is not copied, what lies elsewhere is put there.

        Raises:
            OSError: It could not be written, with its name.
        """
        descriptor = _open(path)
        file = _BlockFile(self, descriptor) if image is None else _ImageFile(self, descriptor, image)
        try:
            yield file
            file.finish()
            os.ftruncate(descriptor, file.size)
            os.fsync(descriptor)
        except OSError as error:
            error.filename = error.filename or os.fspath(path)
            raise
        finally:
            file.abandon()
            self._drain()
            self._error = None
            os.close(descriptor)

    def block(self) -> Bytes:
        """A block to fill.

        Raises:
            OSError: An earlier one could not be written.
        """
        block = self._free.get()
        if self._error is not None:
            self._free.put(block)
            raise self._error
        return block

    def give_back(self, block: Bytes) -> None:
        """Take back a block that is not to be written."""
        self._free.put(block)

    def put(self, descriptor: int, data: Bytes, block: Bytes) -> None:
        """Let ``data`` be appended to a file, and ``block`` be free then."""
        self._full.put((descriptor, data, block))

    def _drain(self) -> None:
        blocks = [self._free.get() for _ in range(self._count)]
        for block in blocks:
            self._free.put(block)

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            OSError: Something could not be.
        """
        self._drain()
        if self._error is not None:
            raise self._error

    def _write_blocks(self) -> None:
        while (work := self._full.get()) is not None:
            descriptor, data, block = work
            if self._error is None:
                try:
                    _write_whole(descriptor, data)
                except OSError as error:
                    self._error = error
            self._free.put(block)


class _BlockFile:
    """A file that is being written in blocks."""

    def __init__(self, blocks: Blocks, descriptor: int) -> None:
        self._blocks = blocks
        self._descriptor = descriptor
        self._digest = DigestSink()
        self._block: Bytes | None = None
        self._filled = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._digest.size

    def written(self) -> WrittenFile:
        """What was written, once it is whole."""
        return self._digest.written()

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        """Append."""
        self._digest.write(data)
        source = np.frombuffer(data, np.uint8)
        while source.size:
            if self._block is None:
                self._block, self._filled = self._blocks.block(), 0
            taken = min(source.size, self._block.size - self._filled)
            self._block[self._filled : self._filled + taken] = source[:taken]
            self._filled += taken
            source = source[taken:]
            if self._filled == self._block.size:
                self._hand_over(self._filled)

    def finish(self) -> None:
        """Write the rest."""
        if self._block is not None:
            whole = -(-self._filled // _ALIGNMENT) * _ALIGNMENT  # what is too much is cut off afterwards
            self._block[self._filled : whole] = 0
            self._hand_over(whole)
        self._blocks.finish()

    def abandon(self) -> None:
        """Give back the block that was being filled."""
        block, self._block = self._block, None
        if block is not None:
            self._blocks.give_back(block)

    def _hand_over(self, size: int) -> None:
        assert self._block is not None
        block, self._block = self._block, None
        self._blocks.put(self._descriptor, block[:size], block)


class _ImageFile:
    """A file that is being written from memory laid out like it."""

    def __init__(self, blocks: Blocks, descriptor: int, image: Bytes) -> None:
        self._blocks = blocks
        self._descriptor = descriptor
        self._image = image
        self._digest = DigestSink()
        self._handed_over = 0

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._digest.size

    def written(self) -> WrittenFile:
        """What was written, once it is whole."""
        return self._digest.written()

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        """Append."""
        begin = self.size
        self._digest.write(data)
        source, target = np.frombuffer(data, np.uint8), self._image[begin : self.size]
        if address(source) != address(target):
            target[:] = source
        while self.size - self._handed_over >= self._blocks.size:
            self._hand_over(self._blocks.size)

    def finish(self) -> None:
        """Write the rest."""
        whole = -(-self.size // _ALIGNMENT) * _ALIGNMENT  # what is too much is cut off afterwards
        self._image[self.size : whole] = 0
        self._hand_over(whole - self._handed_over)
        self._blocks.finish()

    def abandon(self) -> None:
        """There is nothing to give back."""

    def _hand_over(self, size: int) -> None:
        data = self._image[self._handed_over : self._handed_over + size]
        self._handed_over += size
        self._blocks.put(self._descriptor, data, self._blocks.block())  # a free block is the leave to go on


def _open(path: Path) -> int:
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


def _write_whole(descriptor: int, data: Bytes) -> None:
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
        logger.info("%s: this file system has no direct writes; background saves go through the page cache", path)
