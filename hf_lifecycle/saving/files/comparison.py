"""A file that a host has just written, and what it is expected to hold: compared later, while training continues.

Promise: :meth:`Comparison.run` returns only where every tensor in the file has the digest that its live tensor had when
the file was written, and the file has the very bytes that are written here of such tensors. It needs no live tensor,
reads the file once, and gives its digest on the way; on the writer's thread, as everything there: no accelerator, no
exchange with other ranks, no random number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.saving.files.archive import Sink, TorchArchive
from hf_lifecycle.saving.files.direct import DigestSink
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout
from hf_lifecycle.saving.snapshots.image import address
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.state.fingerprint import tensor_digest
from hf_lifecycle.torch_internals import storage_id

__all__ = ["Comparison", "Part", "comparison_of_archive", "comparison_of_layout"]

Bytes = npt.NDArray[np.uint8]
_Content = Callable[[Any], Bytes]  # the bytes of a part, by its key


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor in the file: where it begins, and what it was called, and was, in the training.

    Attributes:
        name: What its digest is found by.
        before: The bytes of the file's tensor that come before it, where that has more than this one: the rows of
            other ranks.
        after: Those that come after it.
    """

    offset: int
    name: str
    dtype: torch.dtype
    shape: torch.Size
    before: int = 0
    after: int = 0

    @property
    def size(self) -> int:
        """The bytes of the file's tensor."""
        return self.before + self._own + self.after

    @property
    def _own(self) -> int:
        return self.dtype.itemsize * self.shape.numel()

    def compare(self, file: str, data: Bytes, digests: Mapping[str, str]) -> None:
        """Raise ``NotLearned`` unless ``data``, all bytes of the file's tensor, has this one."""
        own = torch.empty(self.shape, dtype=self.dtype)
        if self._own:  # of none, the bytes cannot be seen as numbers
            rows = data[self.before : self.before + self._own]
            own = torch.from_numpy(rows).view(self.dtype).reshape(self.shape)
        if tensor_digest(own) != digests.get(self.name):
            raise NotLearned(f"{file}: {self.name} in it differs from the state of the training")


@dataclass(frozen=True, slots=True)
class Comparison:
    """One file.

    Attributes:
        name: Its path in the checkpoint.
        write: Writes it to a sink, where the bytes of its parts are given.
        parts: The tensors that it is made of, by what ``write`` asks for them by.
    """

    name: str
    write: Callable[[Sink, _Content], None]
    parts: Mapping[Hashable, Part]

    def run(self, folder: Path, digests: Mapping[str, str]) -> FileEntry:
        """Compare the file in ``folder``.

        Args:
            digests: Those of the live tensors when the file was written, by name.

        Returns:
            The file, as a manifest lists it.

        Raises:
            NotLearned: The file holds something else.
            OSError: It cannot be read.
        """
        path = folder / self.name
        with open(path, "rb", buffering=0) as file:
            memory = np.empty(max((part.size for part in self.parts.values()), default=0), np.uint8)
            sink = _Against(self.name, file)

            def content(key: Hashable) -> Bytes:
                part = self.parts[key]
                data = memory[: part.size]
                sink.read(part.offset, data)
                part.compare(self.name, data, digests)
                return data

            self.write(sink, content)
            if sink.size != os.fstat(file.fileno()).st_size:
                raise NotLearned(f"{self.name}: it is longer than expected")
        return FileEntry(self.name, sink.size, sink.xxh3_128)


class _Against(DigestSink):
    """Takes the bytes that a file is expected to have, and compares them with those that it has."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        super().__init__()
        self._name = name
        self._file = file
        self._read: tuple[int, int, int] = (0, 0, 0)  # the address, the size and the offset of what was read last

    def read(self, offset: int, data: Bytes) -> None:
        """Fill ``data`` from the file."""
        self._fill(offset, data)
        self._read = address(data), data.size, offset

    def _fill(self, offset: int, data: Bytes) -> None:
        self._file.seek(offset)
        while data.size:
            count = self._file.readinto(data)  # type: ignore[attr-defined]
            if not count:
                raise NotLearned(f"{self._name}: it is shorter than expected")
            data = data[count:]

    def write(self, data: Bytes | bytes | memoryview, /) -> None:
        given = np.frombuffer(data, np.uint8)
        begin, size, offset = self._read
        inside = address(given) - begin
        # What was read from this very place of the file needs no second look at it.
        if not (inside >= 0 and inside + given.size <= size and offset + inside == self.size):
            found = np.empty(given.size, np.uint8)
            self._fill(self.size, found)
            if not np.array_equal(found, given):
                raise NotLearned(f"{self._name}: torch {torch.__version__} does not write it as expected")
        super().write(data)


def comparison_of_layout(
    name: str, layout: SafetensorsLayout, live: Mapping[str, torch.Tensor], called: Callable[[str], str] = str
) -> Comparison:
    """How to compare a model's file whose tensors are whole ``live`` ones.

    Args:
        live: The tensors by each of their names.
        called: What the digest of a tensor, of which the first name is given, is found by.
    """
    first = {id(tensor): other for other, tensor in reversed(list(live.items()))}  # by which it has its digest
    parts: dict[Hashable, Part] = {}
    for offset, place in layout.begins():
        tensor = live[place.name]
        parts[place.name] = Part(offset, called(first[id(tensor)]), tensor.dtype, tensor.shape)
    return Comparison(name, lambda sink, content: layout.write(sink, lambda key: torch.from_numpy(content(key))), parts)


def comparison_of_archive(name: str, archive: TorchArchive, tensors: Sequence[LiveTensor]) -> Comparison | None:
    """How to compare an archive with these tensors; None where not each of its storages is one of them."""
    owners: dict[int, LiveTensor] = {}
    for live in tensors:
        if live.tensor.is_contiguous() and live.tensor.nbytes == live.tensor.untyped_storage().nbytes():
            owners[storage_id(live.tensor)] = live
    _, places = archive.places()
    if not owners.keys() >= places.keys():
        return None
    parts: dict[Hashable, Part] = {
        key: Part(offset, owners[key].name, owners[key].tensor.dtype, owners[key].tensor.shape)
        for key, offset in places.items()
    }
    return Comparison(name, lambda sink, content: archive.write(sink, lambda one: content(storage_id(one))), parts)
