"""Files written past the page cache, in large aligned blocks, with their digest taken as the bytes go by.

Promise: when :meth:`Blocks.file` has ended without an error, all bytes of that file are on the disk, and what it gave
is their size and digest. Where a file system has no direct writes, they go through the page cache; that is logged
once. Not promised: that the name outlives a power cut; the folder is flushed by who commits it.

One thread fills a block while another writes the one before. That thread is started when :class:`Blocks` is made, so
that a save which is under way when the interpreter ends needs no new one.
"""

from __future__ import annotations

import abc
import contextlib
import os
import queue
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from hf_lifecycle.saving.files.descriptors import ALIGNMENT, open_direct, write_whole
from hf_lifecycle.saving.snapshots.image import address
from hf_lifecycle.saving.snapshots.memory import host_memory

__all__ = ["Blocks", "DigestSink"]

Bytes = npt.NDArray[np.uint8]

_DIGESTED = 1 << 19  # bytes, fewer than a core's cache holds
_COUNT = 2  # blocks: one is filled while the other is written


class DigestSink:
    """Takes bytes and keeps their number and digest alone."""

    def __init__(self) -> None:
        self.size = 0
        self._digest = xxhash.xxh3_128()

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        self._digest.update(data)  # type: ignore[arg-type]
        self.size += len(data)

    @property
    def xxh3_128(self) -> str:
        """The digest of what was taken so far, in hexadecimal."""
        return self._digest.hexdigest()


class Blocks:
    """Writes files one after the other; close it when done.

    Args:
        block: Bytes of one block, a multiple of 4096.
    """

    def __init__(self, *, block: int = 8 << 20) -> None:
        self._free: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._full: queue.SimpleQueue[tuple[int, Bytes, Bytes] | None] = queue.SimpleQueue()
        memory = host_memory(block * _COUNT)[0].numpy()
        for number in range(_COUNT):
            self._free.put(memory[number * block : (number + 1) * block])
        self.size = block
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_blocks, name="hf_lifecycle-blocks")
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._full.put(None)
        self._thread.join()

    @contextlib.contextmanager
    def file(self, path: Path, image: Bytes | None = None) -> Iterator[_DirectFile]:
        """A new file to write to; when the block ends, it is whole and flushed.

        Args:
            image: Memory that is laid out like the file, longer up to a multiple of 4096 bytes. What is written and
                lies there already is not copied, what lies elsewhere is put there.

        Raises:
            OSError: It could not be written, with its name. What else went wrong on the writing thread is raised too.
        """
        descriptor = open_direct(path)
        file: _DirectFile = _BlockFile(self, descriptor) if image is None else _ImageFile(self, descriptor, image)
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
            BaseException: What kept an earlier one from being written: mostly an OSError.
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
        blocks = [self._free.get() for _ in range(_COUNT)]
        for block in blocks:
            self._free.put(block)

    def finish(self) -> None:
        """Wait until nothing is being written.

        Raises:
            BaseException: What kept something from being written: mostly an OSError.
        """
        self._drain()
        if self._error is not None:
            raise self._error

    def _write_blocks(self) -> None:
        while (work := self._full.get()) is not None:
            descriptor, data, block = work
            try:
                if self._error is None:
                    write_whole(descriptor, data)
            except BaseException as error:  # noqa: BLE001 - raised by block and finish, on the thread that can act on it
                self._error = error
            finally:
                self._free.put(block)  # Invariant: whatever happens, else the thread that fills blocks waits for ever


class _DirectFile(abc.ABC):
    """A file that is being written through blocks, with its digest."""

    def __init__(self, blocks: Blocks, descriptor: int) -> None:
        self.size = 0  # bytes so far
        self._blocks = blocks
        self._descriptor = descriptor
        self._digest = DigestSink()

    @property
    def xxh3_128(self) -> str:
        """The digest of what was written, once it is whole."""
        return self._digest.xxh3_128

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        """Append."""
        self.size += len(data)
        self._take(np.frombuffer(data, np.uint8))

    def finish(self) -> None:
        """Write the rest."""
        self._hand_over_rest()
        self._blocks.finish()

    def abandon(self) -> None:  # noqa: B027  most have nothing
        """Give back what is not to be written."""

    @abc.abstractmethod
    def _take(self, source: Bytes) -> None: ...

    @abc.abstractmethod
    def _hand_over_rest(self) -> None: ...


class _BlockFile(_DirectFile):
    """One whose bytes are copied into blocks."""

    def __init__(self, blocks: Blocks, descriptor: int) -> None:
        super().__init__(blocks, descriptor)
        self._block: Bytes | None = None
        self._filled = 0

    def _take(self, source: Bytes) -> None:
        self._digest.write(source)
        while source.size:
            if self._block is None:
                self._block, self._filled = self._blocks.block(), 0
            taken = min(source.size, self._block.size - self._filled)
            self._block[self._filled : self._filled + taken] = source[:taken]
            self._filled += taken
            source = source[taken:]
            if self._filled == self._block.size:
                self._hand_over(self._filled)

    def _hand_over_rest(self) -> None:
        if self._block is not None:
            whole = _aligned(self._filled)
            self._block[self._filled : whole] = 0
            self._hand_over(whole)

    def abandon(self) -> None:
        block, self._block = self._block, None
        if block is not None:
            self._blocks.give_back(block)

    def _hand_over(self, size: int) -> None:
        assert self._block is not None
        block, self._block = self._block, None
        self._blocks.put(self._descriptor, block[:size], block)


class _ImageFile(_DirectFile):
    """One that lies in memory already; what of it lies elsewhere is put there."""

    def __init__(self, blocks: Blocks, descriptor: int, image: Bytes) -> None:
        super().__init__(blocks, descriptor)
        self._image = image
        self._begin = address(image)
        self._digested = 0
        self._handed_over = 0

    def _take(self, source: Bytes) -> None:
        begin = self.size - source.size
        if address(source) != self._begin + begin:
            self._image[begin : self.size] = source
        if self.size - self._digested >= _DIGESTED:
            self._digest_to(self.size)
        while self.size - self._handed_over >= self._blocks.size:
            self._hand_over(self._blocks.size)

    def _digest_to(self, end: int) -> None:
        """Take the digest of many small pieces at once, while they are near."""
        self._digest.write(self._image[self._digested : end])
        self._digested = end

    def _hand_over_rest(self) -> None:
        self._digest_to(self.size)
        whole = _aligned(self.size)
        self._image[self.size : whole] = 0
        self._hand_over(whole - self._handed_over)

    def _hand_over(self, size: int) -> None:
        data = self._image[self._handed_over : self._handed_over + size]
        self._handed_over += size
        self._blocks.put(self._descriptor, data, self._blocks.block())  # a free block is the leave to continue


def _aligned(size: int) -> int:
    """What is written of so many bytes; what is too much is cut off afterwards."""
    return -(-size // ALIGNMENT) * ALIGNMENT
