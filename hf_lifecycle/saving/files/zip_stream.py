"""A ZIP file that is not compressed, written as a stream, as torch's writer (miniz) lays it out.

Each record's data begins at a multiple of the alignment, padded by an extra field ``FB``; its size and checksum follow
it, and once more in the directory at the end. 64-bit fields appear where an offset or a size needs them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

try:
    from isal.isal_zlib import crc32  # three times as fast as zlib's
except ImportError:  # no wheel for this machine
    from zlib import crc32

__all__ = ["BLOCK", "Sink", "ZipStream", "combined", "crc32"]

Bytes = npt.NDArray[np.uint8]

BLOCK = 1 << 20
_LIMIT32 = 0xFFFFFFFF
_MASK = (1 << 64) - 1


class Sink(Protocol):
    """Where bytes go, in order."""

    def write(self, data: Bytes | bytes | memoryview, /) -> None: ...


@dataclass(slots=True)
class Record:
    """One record: its name, its size, where it begins, and what follows from its data."""

    name: str
    size: int
    offset: int
    crc: int = 0
    begin: int = 0  # of its data
    entry: int = 0  # where the directory's entry begins


class ZipStream:
    """Writes records one after the other, then the directory of them."""

    def __init__(self, sink: Sink, alignment: int, checksum: Callable[[memoryview, int], int] = crc32) -> None:
        self.combined = 0  # of all records' checksums, as torch combines them
        self.places: list[tuple[int, Bytes]] = []  # where the arrays among the records begin
        self._checksum = checksum
        self._sink = sink
        self._alignment = alignment
        self.records: list[Record] = []
        self._position = 0

    def _write(self, data: Bytes | bytes) -> None:
        self._sink.write(data)
        self._position += len(data)

    def add(self, name: str, data: Bytes | bytes) -> None:
        size = len(data)
        record = Record(name, size, self._position)
        self.records.append(record)
        wide = _wide_fields(record)
        encoded = name.encode()
        start = self._position + 30 + len(encoded) + 4 + len(wide)
        padding = -start % self._alignment
        extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        self._write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, _flags(size), *(0,) * 6, len(encoded), len(extra)))
        self._write(encoded + extra)
        if isinstance(data, np.ndarray):
            self.places.append((self._position, data))
        record.begin = self._position
        view = memoryview(data)  # type: ignore[arg-type]
        for begin in range(0, size, BLOCK):
            block = view[begin : begin + BLOCK]
            record.crc = self._checksum(block, record.crc)
            self._sink.write(block)
        self._position += size
        if not size:  # nothing follows its data, and it does not count in the identity
            return
        self._write(struct.pack("<IIQQ" if wide else "<IIII", 0x08074B50, record.crc, size, size))
        self.combined = combined(self.combined, record.crc)

    def close(self) -> int:
        """Write the directory. Returns the size of the archive."""
        begin = self._position
        for record in self.records:
            wide, encoded = _wide_fields(record), record.name.encode()
            size, offset = min(record.size, _LIMIT32), min(record.offset, _LIMIT32)
            record.entry = self._position
            head = (0x02014B50, 0, 0, _flags(record.size), 0, 0, 0, record.crc, size, size, len(encoded), len(wide))
            self._write(struct.pack("<IHHHHHHIIIHHHHHII", *head, 0, 0, 0, 0, offset) + encoded + wide)
        end, count = self._position, len(self.records)
        size = end - begin
        self._write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count, size, begin))
        self._write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        few = min(count, 0xFFFF)
        tail = (few, few, min(size, _LIMIT32), min(begin, _LIMIT32), 0)
        self._write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *tail))
        return self._position


def combined(so_far: int, crc: int) -> int:
    """The checksums of records, as torch combines them."""
    return so_far ^ ((crc + 0x9E3779B9 + ((so_far << 6) & _MASK) + (so_far >> 2)) & _MASK)


def _flags(size: int) -> int:
    return 0x0808 if size else 0x0800  # names are UTF-8; sizes follow the data


def _wide_fields(record: Record) -> bytes:
    """The 64-bit fields of a record that needs them."""
    fields = [record.size, record.size] if record.size >= _LIMIT32 else []
    fields += [record.offset] if record.offset >= _LIMIT32 else []
    return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
