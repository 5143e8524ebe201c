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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.messages import few
from hf_lifecycle.saving.files.archive import ArchiveOfOne, Sink, TorchArchive, plain_copy
from hf_lifecycle.saving.files.comparison import Comparison, Part
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.sharded.values import Parts
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, bytes_of
from hf_lifecycle.torch_internals import storage_id

__all__ = ["ShardFile", "ShardLayout", "learn_layout"]

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

    def comparison(self, values: Mapping[str, Any], parts: Parts, tensors: Sequence[LiveTensor]) -> Comparison:
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
        items: list[Any] = []
        begin = 0
        for item, length, one in zip(self.items, self.lengths, self.captured(values, parts).values, strict=True):
            if isinstance(one, torch.Tensor):
                name = first.get(_place(one))
                if name is None or not one.is_contiguous():
                    raise NotLearned(f"{self.file}: {item} is of an unknown kind")
                offset = begin + _archive_of(one.dtype, one.shape).begin if one.numel() else begin
                items.append(Part(offset, name, one.dtype, one.shape))
            else:
                items.append(one)
            begin += length

        def write(sink: Sink, content: Callable[[Any], Bytes]) -> None:
            for number, one in enumerate(items):
                if isinstance(one, Part) and one.size:
                    _archive_of(one.dtype, one.shape).write(sink, content(number))
                else:
                    _write_item(sink, torch.empty(one.shape, dtype=one.dtype) if isinstance(one, Part) else one)

        return Comparison(self.file, write, {number: one for number, one in enumerate(items) if isinstance(one, Part)})

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
