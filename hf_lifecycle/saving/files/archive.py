"""What ``torch.save`` writes, written as a stream whose tensors may lie elsewhere than they did.

Promise: :meth:`TorchArchive.write` gives the bytes of ``torch.save(tree, path)``, checksums included, without asking
for all of the data at once. Not promised by itself: that this torch lays archives out so. Whoever relies on it
compares the bytes with those of a file of torch's own first.

What is constant in it (versions, byte order, the hash of the records' names) is taken from an archive of as many empty
tensors that torch is asked to write into memory.
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
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.saving.files.zip_stream import BLOCK, Sink, ZipStream, combined, crc32
from hf_lifecycle.torch_internals import of_typed, storage_id

__all__ = ["ArchiveOfOne", "Sink", "TorchArchive", "plain_copy"]

Bytes = npt.NDArray[np.uint8]
Content = Callable[[torch.UntypedStorage], Bytes]

_DEFAULT_ALIGNMENT = 64
_DATA = "data/"
_PICKLE = "data.pkl"
_IDENTITY = ".data/serialization_id"
_WITHOUT_NAME = "archive"
_PROTOCOL = 2  # torch.serialization.DEFAULT_PROTOCOL
_NAMED = re.compile(rb"c([A-Za-z_][\w.]*)\n[A-Za-z_][\w.]*\n")  # the opcode GLOBAL; maybe the like within a string


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
    elif issubclass(kind, dict) and any(isinstance(key, torch.Tensor) for key in tree):
        raise TypeError("dict by tensor, whose keys change with them")
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
        self._lay_out(ZipStream(sink, self._skeleton.alignment), content)

    def pieces(self, content: Content) -> tuple[int, list[tuple[int, Bytes]]]:
        """The size of the archive, and where in it the bytes of each storage begin; nothing is written."""
        out = ZipStream(_Nowhere(), self._skeleton.alignment, checksum=lambda *_: 0)
        return self._lay_out(out, content), out.places

    def places(self) -> tuple[int, dict[int, int]]:
        """The size of the archive, and where in it the bytes of each storage begin, by the storage's number."""
        size, pieces = self.pieces(lambda storage: np.broadcast_to(np.uint8(0), storage.nbytes()))
        filled = [storage_id(storage) for storage in self.storages if storage.nbytes()]
        return size, dict(zip(filled, (offset for offset, _ in pieces), strict=True))

    @property
    def is_plain(self) -> bool:
        """Whether its pickle names nothing but what is torch's own and ordered dicts."""
        return all(module.startswith((b"torch", b"collections")) for module in _NAMED.findall(self._pickled))

    @property
    def _skeleton(self) -> _Skeleton:
        return _skeleton(len(self.storages))

    def _lay_out(self, out: ZipStream, content: Content) -> int:
        for name, constant in self._skeleton.records.items():
            full = f"{self.prefix}/{name}"
            if name == _PICKLE:
                out.add(full, self._pickled)
            elif name == _IDENTITY:
                out.add(full, _identity(self._skeleton.names_hash, out.combined))
            elif name.startswith(_DATA):
                storage = self.storages[int(name[len(_DATA) :])]
                out.add(full, content(storage) if storage.nbytes() else b"")
            else:
                out.add(full, constant)
        return out.close()


def _identity(names_hash: bytes, combined: int) -> bytes:
    return b"%s%020d" % (names_hash, combined)


class _Nowhere:
    """A sink that keeps nothing."""

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        pass


def _crc_of_constants(data: memoryview, crc: int) -> int:
    return crc32(data, crc) if data.c_contiguous else 0


class _Around:
    """A sink that keeps what is before and behind a place."""

    def __init__(self, begin: int, size: int) -> None:
        self.head, self.tail = bytearray(), bytearray()
        self._begin, self._end, self._position = begin, begin + size, 0

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        if not self._begin <= self._position < self._end:
            kept = self.head if self._position < self._begin else self.tail
            kept += data  # type: ignore[arg-type]
        self._position += len(data)


class ArchiveOfOne:
    """The archives of tensors of one kind, each alone in its storage: the same bytes around those of the tensor.

    Args:
        dtype: Their element type.
        shape: Their shape; not of none.
        prefix: As of :class:`TorchArchive`.

    Attributes:
        begin: Where the tensor's bytes begin.
    """

    def __init__(self, dtype: torch.dtype, shape: torch.Size, prefix: str) -> None:
        archive = TorchArchive(torch.empty(shape, dtype=dtype), prefix)
        (storage,) = archive.storages
        nothing = np.broadcast_to(np.uint8(0), storage.nbytes())
        ((begin, _),) = archive.pieces(lambda _: nothing)[1]
        around = _Around(begin, nothing.size)
        out = ZipStream(around, archive._skeleton.alignment, _crc_of_constants)
        archive._lay_out(out, lambda _: nothing)
        self._head, self._tail = bytes(around.head), bytes(around.tail)
        self._names_hash = archive._skeleton.names_hash
        self.begin, self._end = begin, begin + nothing.size
        self._own = next(number for number, record in enumerate(out.records) if record.begin == begin)
        self._identity = next(n for n, record in enumerate(out.records) if record.name.endswith(_IDENTITY))
        self._records = out.records

    def write(self, sink: Sink, data: Bytes) -> None:
        """Write the archive of a tensor of these bytes."""
        sink.write(self._head)
        crcs = [record.crc for record in self._records]
        crcs[self._own] = 0
        for begin in range(0, len(data), BLOCK):
            block = data[begin : begin + BLOCK]
            crcs[self._own] = crc32(memoryview(block), crcs[self._own])  # type: ignore[arg-type]
            sink.write(block)
        taken = 0
        for crc, record in zip(crcs[: self._identity], self._records, strict=False):
            taken = combined(taken, crc) if record.size else taken
        identity = _identity(self._names_hash, taken)
        crcs[self._identity] = crc32(identity)
        tail = bytearray(self._tail)
        begin = self._records[self._identity].begin - self._end
        tail[begin : begin + len(identity)] = identity
        for number in (self._own, self._identity):
            record = self._records[number]
            for place in (record.begin + record.size + 4, record.entry + 16):
                struct.pack_into("<I", tail, place - self._end, crcs[number])
        sink.write(bytes(tail))


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
