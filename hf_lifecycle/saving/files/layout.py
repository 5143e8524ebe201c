"""How a safetensors file of a model is made of its live tensors: learned from one that was written, then repeated.

Promise: :func:`learn` gives a layout only where each tensor of the file is, byte for byte, one live tensor, or one
contiguous part of one, and no other could be meant; and the layout, written from the live tensors, gives that file's
very bytes. So renamed keys, split experts, shards and adapters are learned; merged, cast or computed tensors are not,
and :class:`NotLearned` says which. A tensor that could be any of several (all zeros, say) may be told apart at a later
save. What :func:`layout_by_name` gives is proved by a :mod:`~hf_lifecycle.saving.files.comparison`.

Two things count as meaning: the file's name is the live tensor's own; or the bytes are found in one place alone. Where
several places have them, the name's last part decides, if the tensors beside it were found beside that place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.checkpoint.files.safetensors_file import TensorSlice, blocks_of_file, read_header
from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.messages import few
from hf_lifecycle.saving.files.archive import Sink
from hf_lifecycle.saving.files.direct import DigestSink

__all__ = ["NotLearned", "SafetensorsLayout", "layout_by_name", "learn"]

Bytes = npt.NDArray[np.uint8]

_BLOCK = 1 << 20
_MOST_PARTS = 4096  # of one live tensor


class NotLearned(Exception):
    """A file is no plain arrangement of live tensors.

    Attributes:
        ambiguous: Whether it may be told at a later save.
    """

    def __init__(self, reason: str, *, ambiguous: bool = False) -> None:
        super().__init__(reason)
        self.ambiguous = ambiguous


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor of a file lies: bytes ``begin`` to ``end``, in C order, of the live tensor ``name``."""

    name: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class SafetensorsLayout:
    """One file.

    Attributes:
        header: Its bytes up to the first tensor.
        places: Where its tensors lie, in the order of the file.
    """

    header: bytes
    places: tuple[_Place, ...]

    @property
    def names(self) -> frozenset[str]:
        """The live tensors that it is made of."""
        return frozenset(place.name for place in self.places)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self.header) + sum(place.end - place.begin for place in self.places)

    def write(self, sink: Sink, tensor: Callable[[str], torch.Tensor]) -> None:
        """Write the file; ``tensor`` gives each live tensor, or its copy, by name."""
        sink.write(self.header)
        name, data = "", np.empty(0, np.uint8)
        for place in self.places:
            if place.name != name:
                name, data = place.name, tensor_bytes(tensor(place.name))
            view = memoryview(data)[place.begin : place.end]  # type: ignore[arg-type]
            for begin in range(0, len(view), _BLOCK):
                sink.write(view[begin : begin + _BLOCK])

    def pieces(self, tensor: Callable[[str], torch.Tensor]) -> tuple[int, list[tuple[int, Bytes]]]:
        """The size of the file, and where in it the bytes of each tensor begin; nothing is written."""
        each = [(at, tensor_bytes(tensor(one.name))[one.begin : one.end]) for at, one in self.begins()]
        return self.size, each

    def begins(self) -> Iterator[tuple[int, _Place]]:
        """Where in the file each of its tensors begins, and lies in the model."""
        offset = len(self.header)
        for place in self.places:
            yield offset, place
            offset += place.end - place.begin


def learn(path: Path, live: Mapping[str, torch.Tensor]) -> SafetensorsLayout:
    """Learn how the file at ``path`` is made of ``live`` tensors by name, which have not changed since it was written.

    Raises:
        NotLearned: It cannot be made of them, or not in one way alone.
        OSError: It cannot be read.
    """
    header, tensors = _read_header(path)
    with open(path, "rb") as file:
        digests = {name: _digest_at(file, tensor) for name, tensor in tensors.items()}
    found = _find(tensors, digests, live)
    unknown = [name for name in tensors if not found[name]]
    if unknown:
        raise NotLearned(f"{path.name}: {few(unknown)} is not a tensor of the model, nor a part of one")
    _tell_apart(found)
    unclear = [name for name, places in found.items() if len(places) > 1]
    if unclear:
        raise NotLearned(f"{path.name}: {few(unclear)} equals several tensors of the model", ambiguous=True)
    layout = SafetensorsLayout(header, tuple(found[name][0] for name in tensors))
    sink = DigestSink()
    layout.write(sink, lambda name: live[name])
    if sink.size != path.stat().st_size or sink.xxh3_128 != digest_file(path):
        raise NotLearned(f"{path.name}: its bytes differ from the model's tensors in the order of its header")
    return layout


def layout_by_name(path: Path, live: Mapping[str, torch.Tensor]) -> SafetensorsLayout | None:
    """The layout that the names and the sizes in the file at ``path`` tell of; what its tensors hold is not looked at.

    Returns:
        None where one has no name of a ``live`` tensor, or another size than that.

    Raises:
        NotLearned: It is no safetensors file.
        OSError: It cannot be read.
    """
    header, tensors = _read_header(path)
    for name, tensor in tensors.items():
        own = live.get(name)
        if own is None or own.nbytes != tensor.size:
            return None
    return SafetensorsLayout(header, tuple(_Place(name, 0, tensor.size) for name, tensor in tensors.items()))


def _read_header(path: Path) -> tuple[bytes, dict[str, TensorSlice]]:
    """The bytes up to the first tensor, and the tensors in the order of the file."""
    try:
        tensors = read_header(path)
    except StateFileError as error:
        raise NotLearned(f"{path.name}: not a safetensors file ({error.reason})") from error
    with open(path, "rb") as file:
        return file.read(min((tensor.begin for tensor in tensors.values()), default=path.stat().st_size)), tensors


def _digest_at(file: IO[bytes], tensor: TensorSlice) -> bytes:
    digest = xxhash.xxh3_128()
    for block in blocks_of_file(file, tensor):
        digest.update(block.data)
    return digest.digest()


def _find(
    tensors: Mapping[str, TensorSlice], digests: Mapping[str, bytes], live: Mapping[str, torch.Tensor]
) -> dict[str, list[_Place]]:
    """Every place that a tensor of the file could lie at: that of its own name, or else all with its bytes."""
    found: dict[str, list[_Place]] = {}
    others = {}
    for name, tensor in tensors.items():
        own = live.get(name)
        if own is not None and own.nbytes == tensor.size and _whole_digest(own) == digests[name]:
            found[name] = [_Place(name, 0, tensor.size)]
        else:
            others[name] = tensor.size
    if others:
        index = _index(set(others.values()), live)
        for name, size in others.items():
            found[name] = index.get((size, digests[name]), [])
    return found


def _whole_digest(tensor: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(tensor_bytes(tensor).data)


def _index(sizes: set[int], live: Mapping[str, torch.Tensor]) -> dict[tuple[int, bytes], list[_Place]]:
    """All whole live tensors of one of these sizes, and all equal parts of those that such parts make up."""
    index: dict[tuple[int, bytes], list[_Place]] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in live.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if tensor.nbytes and seen.setdefault(place, name) != name:
            continue  # one tensor under two names
        data = tensor_bytes(tensor)
        for size in sizes:
            parts = data.size // size if size else 0
            if parts < 1 or parts * size != data.size or parts > _MOST_PARTS:
                continue
            for begin in range(0, data.size, size):
                key = (size, xxhash.xxh3_128_digest(data[begin : begin + size].data))
                index.setdefault(key, []).append(_Place(name, begin, begin + size))
    return index


def _tell_apart(found: dict[str, list[_Place]]) -> None:
    """Where several places have the bytes: the one beside the tensors of the same module, under the same last name."""
    modules: dict[str, set[str]] = {}
    for name, places in found.items():
        if len(places) == 1:
            modules.setdefault(name.rpartition(".")[0], set()).add(places[0].name.rpartition(".")[0])
    for name, places in found.items():
        if len(places) > 1:
            module, _, leaf = name.rpartition(".")
            beside = {f"{owner}.{leaf}" for owner in modules.get(module, ())}
            chosen = [place for place in places if place.name in beside]
            if len(chosen) == 1:
                found[name] = chosen
