"""The files of one folder of ``torch.distributed.checkpoint`` (DCP): learned from what DCP wrote, and written again.

``__R_0.distcp`` has the items of rank R one after the other, each as ``torch.save`` writes one value into a stream.
``.metadata`` is a pickle that says of each where it lies. Promise: :func:`learn_layout` gives a layout only where the
items of this rank account for every byte of its file, and ``.metadata``, pickled again, has its own bytes. That the
items are written as torch writes them, :meth:`ShardLayout.comparison` proves.
"""

from __future__ import annotations

import functools
import pickle
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.messages import few
from hf_lifecycle.saving.files.archive import ArchiveOfOne, Sink, TorchArchive, plain_copy
from hf_lifecycle.saving.files.direct import DigestSink
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.sharded.values import Parts
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, bytes_of
from hf_lifecycle.state.fingerprint import tensor_digest
from hf_lifecycle.torch_internals import storage_id

__all__ = ["ShardComparison", "ShardFile", "ShardLayout", "learn_layout"]

Bytes = npt.NDArray[np.uint8]

_METADATA = ".metadata"
_PREFIX = "archive"  # what torch.save calls an archive that it writes into a stream


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """What one rank writes into one folder.

    Attributes:
        folder: The folder, by its path in the checkpoint.
        file: This rank's file, likewise.
        items: The names of the values in it, in their order.
        lengths: Their bytes when this was learned.
        metadata: What DCP wrote beside the files, of all ranks.
    """

    folder: str
    file: str
    items: tuple[str, ...]
    lengths: tuple[int, ...]
    metadata: Any

    def captured(self, values: Mapping[str, Any], parts: Parts) -> ShardFile:
        """The file, made of these values at this moment: of tensors this rank's parts, which a snapshot has.

        Raises:
            KeyError: There is no value of a name.
            TypeError: A value may change, and is no plain container.
        """
        items = [values[name] for name in self.items]
        return ShardFile(self, [parts.of(one) if isinstance(one, torch.Tensor) else plain_copy(one) for one in items])

    def comparison(self, values: Mapping[str, Any], parts: Parts, tensors: Sequence[LiveTensor]) -> ShardComparison:
        """How to compare the file that was just written with what it was made of.

        Args:
            values: Of that moment, as above.
            parts: Gives this rank's parts.
            tensors: All that there are, by the names of their digests.

        Raises:
            NotLearned: A part is not among these, or does not lie in memory as in a file.
        """
        first: dict[Any, str] = {}
        for live in tensors:
            first.setdefault(_place(live.tensor), live.name)
        items: list[_Tensor | Any] = []
        for one in self.captured(values, parts).values:
            if not isinstance(one, torch.Tensor):
                items.append(one)
                continue
            name = first.get(_place(one))
            if name is None or not one.is_contiguous():
                raise NotLearned(f"{self.file}: {self.items[len(items)]} is of an unknown kind")
            items.append(_Tensor(name, one.dtype, one.shape))
        return ShardComparison(self.file, tuple(zip(self.items, self.lengths, items, strict=True)))

    def described(self, folder: Path, lengths: Mapping[str, Sequence[int]]) -> bytes:
        """The content of ``.metadata``.

        Args:
            folder: Where the folder lies.
            lengths: The bytes of all items of those files, by their name in the folder, where any is another now.
        """
        metadata, counts = self.metadata, {name: iter(own) for name, own in lengths.items()}
        if counts:
            ends = dict.fromkeys(counts, 0)
            places = dict(metadata.storage_data)
            for index, place in _places(metadata):
                name = place.relative_path
                if name in counts:
                    places[index] = replace(place, offset=ends[name], length=next(counts[name]))
                    ends[name] += places[index].length
            metadata = replace(metadata, storage_data=places)
        if metadata.storage_meta is not None:
            where = type(metadata.storage_meta.checkpoint_id)(folder)
            told = replace(metadata.storage_meta, checkpoint_id=where, save_id=str(uuid.uuid4()))
            metadata = replace(metadata, storage_meta=told)
        return pickle.dumps(metadata)


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One rank's file of one save.

    Attributes:
        layout: How it is laid out.
        values: What is in it: live tensors, which a snapshot has the copies of, and plain values.
    """

    layout: ShardLayout
    values: list[Any]

    @property
    def name(self) -> str:
        """Its path in the checkpoint."""
        return self.layout.file

    def write(self, sink: Any, snapshot: Snapshot) -> list[int]:
        """Write the file. Returns the bytes of each item."""
        lengths = []
        for value in self.values:
            before = sink.size
            _write_item(sink, snapshot.tensor(value) if isinstance(value, torch.Tensor) else value)
            lengths.append(sink.size - before)
        return lengths


def _write_item(sink: Sink, value: Any) -> None:
    if isinstance(value, torch.Tensor) and value.numel():
        _archive_of(value.dtype, value.shape).write(sink, value.view(-1).view(torch.uint8).numpy())
    else:
        archive = TorchArchive(torch.empty_like(value) if isinstance(value, torch.Tensor) else value, _PREFIX)
        archive.write(sink, lambda storage: bytes_of(storage).numpy())


@functools.lru_cache(maxsize=1024)
def _archive_of(dtype: torch.dtype, shape: torch.Size) -> ArchiveOfOne:
    return ArchiveOfOne(dtype, shape, _PREFIX)


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return storage_id(tensor), tensor.storage_offset(), tensor.shape, tensor.dtype


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor that is compared by its digest."""

    name: str
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True, slots=True)
class ShardComparison:
    """As :class:`~hf_lifecycle.saving.files.comparison.Comparison`, of one rank's file.

    Attributes:
        name: The file, by its path in the checkpoint.
        items: The name of each, its bytes, and what it is to hold.
    """

    name: str
    items: tuple[tuple[str, int, Any], ...]

    def run(self, folder: Path, digests: Mapping[str, str]) -> FileEntry:
        """Compare the file in ``folder``.

        Raises:
            NotLearned: The file holds something else.
            OSError: It cannot be read.
        """
        taken = DigestSink()
        with open(folder / self.name, "rb") as file:
            for item, length, value in self.items:
                raw = np.empty(length, np.uint8)
                if file.readinto(raw) != length:  # type: ignore[arg-type]
                    raise NotLearned(f"{self.name}: it is shorter than expected")
                taken.write(raw)
                self._compare(item, raw, value, digests)
            if file.read(1):
                raise NotLearned(f"{self.name}: it is longer than expected")
        written = taken.written()
        return FileEntry(self.name, written.size, written.xxh3_128)

    def _compare(self, item: str, raw: Bytes, value: Any, digests: Mapping[str, str]) -> None:
        if isinstance(value, _Tensor):
            stand_in, count = torch.empty(value.shape, dtype=value.dtype), value.dtype.itemsize * value.shape.numel()
            _, pieces = TorchArchive(stand_in, _PREFIX).pieces(lambda _: np.broadcast_to(np.uint8(0), count))
            offset = pieces[0][0] if pieces else 0
            if count and offset + count > raw.size:
                raise NotLearned(f"{self.name}: {item} is shorter than expected")
            data = torch.from_numpy(raw[offset : offset + count]) if count else torch.empty(0, dtype=torch.uint8)
            found = data.clone().view(value.dtype).view(value.shape)  # where it begins, it need not be aligned
            if tensor_digest(found) != digests.get(value.name):
                raise NotLearned(f"{self.name}: {item} in it differs from the state of the training")
            value = found
        again = _Collected()
        _write_item(again, value)
        if not again.equals(raw):
            raise NotLearned(f"{self.name}: torch {torch.__version__} does not write {item} as expected")


class _Collected:
    """A sink that keeps pieces, to compare them with bytes."""

    def __init__(self) -> None:
        self._pieces: list[Any] = []

    def write(self, data: Any, /) -> None:
        self._pieces.append(data)

    def equals(self, raw: Bytes) -> bool:
        begin = 0
        for piece in self._pieces:
            own = np.frombuffer(piece, np.uint8)
            if not np.array_equal(own, raw[begin : begin + own.size]):
                return False
            begin += own.size
        return begin == raw.size


def learn_layout(checkpoint: Path, folder: str, rank: int, values: Mapping[str, Any]) -> ShardLayout:
    """Learn what this rank has written into a folder, right after it has.

    Args:
        checkpoint: Where the folder is.
        folder: Its path there.
        rank: This rank.
        values: What was saved there, by DCP's names.

    Raises:
        NotLearned: Something in it is not accounted for.
        OSError: A file cannot be read.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    place = checkpoint / folder
    name = f"__{rank}_0.distcp"
    metadata = FileSystemReader(place).read_metadata()
    if metadata.storage_meta is not None:
        metadata.storage_meta.load_id = None  # the reader's
    if pickle.dumps(metadata) != (place / _METADATA).read_bytes():
        raise NotLearned(f"{folder}/{_METADATA}: torch {torch.__version__} does not write it as expected")
    unlike = metadata.state_dict_metadata.keys() ^ values.keys()
    if unlike:
        raise NotLearned(f"{folder}: {few(sorted(unlike))} differs from what is trained, or is missing")
    own = [(index.fqn, place) for index, place in _places(metadata) if place.relative_path == name]
    lengths = tuple(found.length for _, found in own)
    begins = np.cumsum([0, *lengths]).tolist()
    if [found.offset for _, found in own] != begins[:-1] or (place / name).stat().st_size != begins[-1]:
        raise NotLearned(f"{folder}/{name}: its items are not stored one after the other")
    items = tuple(fqn for fqn, _ in own)
    if len(set(items)) != len(items):
        raise NotLearned(f"{folder}/{name}: it has several parts of one tensor")
    return ShardLayout(folder, f"{folder}/{name}", items, lengths, metadata)


def _places(metadata: Any) -> Iterator[tuple[Any, Any]]:
    yield from sorted(metadata.storage_data.items(), key=lambda item: item[1].offset)
