"""What ``torch.save`` writes, written as a stream whose tensors may lie elsewhere than they did.

Promise: :meth:`TorchArchive.write` gives the bytes of ``torch.save(tree, path)``, checksums included, without asking
for all of the data at once. Not promised by itself: that this torch lays archives out so. Whoever relies on it
compares the bytes with those of a file of torch's own first.

The archive is a ZIP file, not compressed, as torch's writer (miniz) makes it: each record's data begins at a multiple
of :data:`_DEFAULT_ALIGNMENT`, padded by an extra field ``FB``; sizes and checksum follow the data; 64-bit fields
appear where an offset or a size needs them. What is constant in it (versions, byte order, the hash of the records'
names) is taken from an archive of as many empty tensors that torch is asked to write into memory.
"""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

try:
    from isal.isal_zlib import crc32  # three times as fast as zlib's
except ImportError:  # no wheel for this machine
    from zlib import crc32

from hf_lifecycle.torch_internals import of_typed, storage_id

__all__ = ["Sink", "TorchArchive", "plain_copy"]

Bytes = npt.NDArray[np.uint8]
Content = Callable[[torch.UntypedStorage], Bytes]

_BLOCK = 1 << 20
_LIMIT32 = 0xFFFFFFFF
_DEFAULT_ALIGNMENT = 64
_DATA = "data/"
_PICKLE = "data.pkl"
_IDENTITY = ".data/serialization_id"
_WITHOUT_NAME = "archive"
_PROTOCOL = 2  # torch.serialization.DEFAULT_PROTOCOL
_MASK = (1 << 64) - 1
_NAMED = re.compile(rb"c([A-Za-z_][\w.]*)\n[A-Za-z_][\w.]*\n")  # the opcode GLOBAL; maybe the like within a string


class Sink(Protocol):
    """Where bytes go, in order."""

    def write(self, data: Bytes | bytes | memoryview, /) -> None: ...


def plain_copy(tree: Any, known: dict[int, Any] | None = None) -> Any:
    """``tree`` with containers of its own, so that it stays as it is; tensors share their memory with the live ones.

    What is there twice is there twice in the copy, as a pickle tells. Attributes given to a tensor are not kept.

    Args:
        known: Copies that there are already, by the ``id()`` of what they are of; more are added.

    Raises:
        TypeError: It holds something that may change and is neither a tensor nor a plain container.
    """
    return _copied(tree, {} if known is None else known)


def _copied(tree: Any, known: dict[int, Any]) -> Any:
    kind = type(tree)
    if kind in _CONSTANT:
        return tree
    copied = known.get(id(tree))
    if copied is not None:
        return copied
    if kind is torch.Tensor:  # what is done to the live tensor's place is not done to this one
        copied = tree if tree.requires_grad else tree.detach()
    elif kind is dict:
        copied = {key: one if type(one) in _CONSTANT else _copied(one, known) for key, one in tree.items()}
    elif kind in _SEQUENCES:
        copied = kind([one if type(one) in _CONSTANT else _copied(one, known) for one in tree])
    elif kind is OrderedDict:
        copied = kind((key, _copied(value, known)) for key, value in tree.items())
    elif isinstance(tree, (torch.Tensor, np.generic)):
        copied = tree
    else:
        raise TypeError(f"{kind.__module__}.{kind.__qualname__}")
    known[id(tree)] = copied
    return copied


_SEQUENCES = frozenset({list, tuple, set})
_CONSTANT = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, torch.Generator}
)


@dataclass(slots=True)
class _Record:
    name: str
    size: int
    offset: int
    crc: int = 0


@dataclass(slots=True)
class TorchArchive:
    """The archive of one tree.

    Args:
        tree: What ``torch.save`` would be given. Only its structure is read here.
        prefix: What torch puts before every record's name: that of the file without its suffix, as a rule.

    Attributes:
        storages: The tensors' storages in the order in which they are written.
    """

    tree: Any
    prefix: str
    storages: list[torch.UntypedStorage] = field(default_factory=list, init=False)
    _pickled: bytes = field(default=b"", init=False)

    def __post_init__(self) -> None:
        self._pickled, self.storages = _pickle(self.tree)

    def at(self, path: Path) -> TorchArchive:
        """The same as torch writes it to this path: it cannot name the records after one that is not ASCII."""
        made = copy.copy(self)
        made.prefix = path.stem if str(path).isascii() else _WITHOUT_NAME
        return made

    def write(self, sink: Sink, content: Content) -> None:
        """Write the archive; ``content`` gives the bytes of each storage."""
        self._lay_out(_ZipStream(sink, self._skeleton.alignment), content)

    def pieces(self, content: Content) -> tuple[int, list[tuple[int, Bytes]]]:
        """The size of the archive, and where in it the bytes of each storage begin; nothing is written."""
        out = _ZipStream(_Nowhere(), self._skeleton.alignment, checksum=lambda *_: 0)
        return self._lay_out(out, content), out.places

    @property
    def is_plain(self) -> bool:
        """Whether its pickle names nothing but what is torch's own and ordered dicts."""
        return all(module.startswith((b"torch", b"collections")) for module in _NAMED.findall(self._pickled))

    @property
    def _skeleton(self) -> _Skeleton:
        return _skeleton(len(self.storages))

    def _lay_out(self, out: _ZipStream, content: Content) -> int:
        for name, constant in self._skeleton.records.items():
            full = f"{self.prefix}/{name}"
            if name == _PICKLE:
                out.add(full, self._pickled)
            elif name == _IDENTITY:
                out.add(full, b"%s%020d" % (self._skeleton.names_hash, out.combined))
            elif name.startswith(_DATA):
                storage = self.storages[int(name[len(_DATA) :])]
                out.add(full, content(storage) if storage.nbytes() else b"")
            else:
                out.add(full, constant)
        return out.close()


class _Nowhere:
    """A sink that keeps nothing."""

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        pass


def _pickle(tree: Any) -> tuple[bytes, list[torch.UntypedStorage]]:
    """The pickle that torch puts into an archive, and the storages that it refers to."""
    keys: dict[int, str] = {}
    storages: list[torch.UntypedStorage] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> Any:
            if not isinstance(item, (torch.storage.TypedStorage, torch.UntypedStorage)):
                return None
            if isinstance(item, torch.storage.TypedStorage):
                storage, size, kind = of_typed(item)
            else:
                storage, size = item, item.nbytes()
                kind = torch.serialization.normalize_storage_type(type(item))  # type: ignore[no-untyped-call]
            key = keys.get(storage_id(storage))
            if key is None:
                key = keys[storage_id(storage)] = str(len(keys))
                storages.append(storage)
            return ("storage", kind, key, torch.serialization.location_tag(storage), size)

    stream = io.BytesIO()
    Pickler(stream, protocol=_PROTOCOL).dump(tree)
    return stream.getvalue(), storages


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """What an archive with a given number of storages has in common with every other."""

    records: Mapping[str, bytes]
    names_hash: bytes
    alignment: int


@functools.lru_cache(maxsize=4)
def _skeleton(count: int) -> _Skeleton:
    stream = io.BytesIO()
    torch.save([torch.empty(0, dtype=torch.uint8) for _ in range(count)], stream)
    with zipfile.ZipFile(stream) as archive:
        records = {entry.filename.partition("/")[2]: archive.read(entry) for entry in archive.infolist()}
    alignment = int(records.get(".storage_alignment", b"%d" % _DEFAULT_ALIGNMENT))
    return _Skeleton(records, records[_IDENTITY][:20], alignment)


class _ZipStream:
    """Writes records one after the other, then the directory of them."""

    def __init__(self, sink: Sink, alignment: int, checksum: Callable[[memoryview, int], int] = crc32) -> None:
        self.combined = 0  # of all records' checksums, as torch combines them
        self.places: list[tuple[int, Bytes]] = []  # where the arrays among the records begin
        self._checksum = checksum
        self._sink = sink
        self._alignment = alignment
        self._records: list[_Record] = []
        self._position = 0

    def _write(self, data: Bytes | bytes) -> None:
        self._sink.write(data)
        self._position += len(data)

    def add(self, name: str, data: Bytes | bytes) -> None:
        size = len(data)
        record = _Record(name, size, self._position)
        self._records.append(record)
        wide = _wide_fields(record)
        encoded = name.encode()
        start = self._position + 30 + len(encoded) + 4 + len(wide)
        padding = -start % self._alignment
        extra = wide + b"FB" + struct.pack("<H", padding) + b"Z" * padding
        self._write(struct.pack("<IHHHHHIIIHH", 0x04034B50, 0, _flags(size), *(0,) * 6, len(encoded), len(extra)))
        self._write(encoded + extra)
        if isinstance(data, np.ndarray):
            self.places.append((self._position, data))
        view = memoryview(data)  # type: ignore[arg-type]
        for begin in range(0, size, _BLOCK):
            block = view[begin : begin + _BLOCK]
            record.crc = self._checksum(block, record.crc)
            self._sink.write(block)
        self._position += size
        if not size:  # nothing follows its data, and it does not count in the identity
            return
        self._write(struct.pack("<IIQQ" if wide else "<IIII", 0x08074B50, record.crc, size, size))
        shifted = (record.crc + 0x9E3779B9 + ((self.combined << 6) & _MASK) + (self.combined >> 2)) & _MASK
        self.combined ^= shifted

    def close(self) -> int:
        """Write the directory. Returns the size of the archive."""
        begin = self._position
        for record in self._records:
            wide, encoded = _wide_fields(record), record.name.encode()
            size, offset = min(record.size, _LIMIT32), min(record.offset, _LIMIT32)
            head = (0x02014B50, 0, 0, _flags(record.size), 0, 0, 0, record.crc, size, size, len(encoded), len(wide))
            self._write(struct.pack("<IHHHHHHIIIHHHHHII", *head, 0, 0, 0, 0, offset) + encoded + wide)
        end, count = self._position, len(self._records)
        size = end - begin
        self._write(struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 0x031E, 45, 0, 0, count, count, size, begin))
        self._write(struct.pack("<IIQI", 0x07064B50, 0, end, 1))
        few = min(count, 0xFFFF)
        tail = (few, few, min(size, _LIMIT32), min(begin, _LIMIT32), 0)
        self._write(struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, *tail))
        return self._position


def _flags(size: int) -> int:
    return 0x0808 if size else 0x0800  # names are UTF-8; sizes follow the data


def _wide_fields(record: _Record) -> bytes:
    """The 64-bit fields of a record that needs them."""
    fields = [record.size, record.size] if record.size >= _LIMIT32 else []
    fields += [record.offset] if record.offset >= _LIMIT32 else []
    return struct.pack(f"<HH{len(fields)}Q", 1, 8 * len(fields), *fields) if fields else b""
