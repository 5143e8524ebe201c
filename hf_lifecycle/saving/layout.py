"""How a safetensors file of a model is made of its live tensors: learned from one that was written, then repeated.

Promise: :func:`learn` gives a layout only where each tensor of the file is, byte for byte, one live tensor, or one
contiguous part of one, and no other could be meant; and the layout, written from the live tensors, gives that file's
very bytes. So renamed keys, split experts, shards and adapters are learned; merged, cast or computed tensors are not,
and :class:`NotLearned` says which. A tensor that could be any of several (all zeros, say) may be told apart at a later
save. What :func:`layout_by_name` gives is proved by a :mod:`~hf_lifecycle.saving.comparison`.

Two things count as meaning: the file's name is the live tensor's own; or the bytes are found in one place alone. Where
several places have them, the name's last part decides, if the tensors beside it were found beside that place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.saving.archive import Sink
from hf_lifecycle.saving.direct import DigestSink

__all__ = ["NotLearned", "SafetensorsLayout", "layout_by_name", "learn"]

Bytes = npt.NDArray[np.uint8]

_BLOCK = 1 << 20
_MOST_HEADER = 100 << 20
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
class _Entry:
    name: str
    dtype: str
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


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
        offset, found = len(self.header), []
        for place in self.places:
            found.append((offset, tensor_bytes(tensor(place.name))[place.begin : place.end]))
            offset += place.end - place.begin
        return offset, found


def learn(path: Path, live: Mapping[str, torch.Tensor]) -> SafetensorsLayout:
    """Learn how the file at ``path`` is made of ``live`` tensors by name, which have not changed since it was written.

    Raises:
        NotLearned: It cannot be made of them, or not in one way alone.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        header, entries = _read_header(file, path)
        digests = {entry.name: _digest_at(file, len(header) + entry.begin, entry.size) for entry in entries}
    found = _find(entries, digests, live)
    unknown = [entry.name for entry in entries if not found[entry.name]]
    if unknown:
        raise NotLearned(f"{path.name}: {_some(unknown)} is no live tensor of the model, nor a part of one")
    _tell_apart(found)
    unclear = [name for name, places in found.items() if len(places) > 1]
    if unclear:
        raise NotLearned(f"{path.name}: {_some(unclear)} equals several live tensors", ambiguous=True)
    layout = SafetensorsLayout(header, tuple(found[entry.name][0] for entry in entries))
    sink = DigestSink()
    layout.write(sink, lambda name: live[name])
    if sink.size != path.stat().st_size or sink.written().xxh3_128 != _digest_of(path):
        raise NotLearned(f"{path.name}: its bytes are not those of the live tensors in the order of its header")
    return layout


def layout_by_name(path: Path, live: Mapping[str, torch.Tensor]) -> SafetensorsLayout | None:
    """The layout that the names and the sizes in the file at ``path`` tell of; what its tensors hold is not looked at.

    Returns:
        None where one has no name of a ``live`` tensor, or another size than that.

    Raises:
        NotLearned: It is no safetensors file.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        header, entries = _read_header(file, path)
    end = 0
    for entry in entries:
        own = live.get(entry.name)
        if own is None or own.nbytes != entry.size or entry.begin != end:
            return None
        end = entry.end
    return SafetensorsLayout(header, tuple(_Place(entry.name, 0, entry.size) for entry in entries))


def _read_header(file: IO[bytes], path: Path) -> tuple[bytes, list[_Entry]]:
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > _MOST_HEADER:
        raise NotLearned(f"{path.name}: not a safetensors file")
    text = file.read(length)
    try:
        table = json.loads(text)
        entries = [
            _Entry(name, entry["dtype"], *entry["data_offsets"])
            for name, entry in table.items()
            if name != "__metadata__"
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotLearned(f"{path.name}: not a safetensors file ({error})") from error
    return prefix + text, sorted(entries, key=lambda entry: (entry.begin, entry.end))


def _digest_at(file: IO[bytes], offset: int, size: int) -> bytes:
    digest = xxhash.xxh3_128()
    file.seek(offset)
    while size:
        block = file.read(min(size, _BLOCK))
        if not block:
            raise NotLearned("a safetensors file is shorter than its header says")
        digest.update(block)
        size -= len(block)
    return digest.digest()


def _digest_of(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _find(
    entries: Iterable[_Entry], digests: Mapping[str, bytes], live: Mapping[str, torch.Tensor]
) -> dict[str, list[_Place]]:
    """Every place that a tensor of the file could lie at: that of its own name, or else all with its bytes."""
    found: dict[str, list[_Place]] = {}
    others = []
    for entry in entries:
        own = live.get(entry.name)
        if own is not None and own.nbytes == entry.size and _whole_digest(own) == digests[entry.name]:
            found[entry.name] = [_Place(entry.name, 0, entry.size)]
        else:
            others.append(entry)
    if others:
        index = _index({entry.size for entry in others}, live)
        for entry in others:
            found[entry.name] = index.get((entry.size, digests[entry.name]), [])
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


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
