"""A file of full tensors, seen by a rank that has some rows of each of them.

Promise: what is written has the bytes of a host's file, whose tensors a collective has gathered; where it has not,
:meth:`FullFile.comparison` finds it. No tensor is gathered for that.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.saving.captured import Provable
from hf_lifecycle.saving.files.archive import Sink, TorchArchive
from hf_lifecycle.saving.files.comparison import Comparison, Part
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import bytes_of
from hf_lifecycle.state.fingerprint import is_shared_out
from hf_lifecycle.state.proof import with_tensors
from hf_lifecycle.torch_internals import storage_id

__all__ = ["FullFile", "Rows", "archive_of", "file_of_layout", "require_rows"]

Bytes = npt.NDArray[np.uint8]
Content = Callable[[Any], Bytes]


class Rows:
    """The rows that each rank has of the tensors that are shared out.

    Args:
        tensors: This rank's part of everything, with what it is a part of.
        ranks: How many ranks there are.
    """

    def __init__(self, tensors: Sequence[LiveTensor], ranks: int) -> None:
        self.ranks = ranks
        self.wholes: dict[int, torch.Tensor] = {}  # by the identity of the part, in the order in which it is left
        self.parts: list[torch.Tensor] = []
        for live in tensors:
            if live.whole is not None and _is_by_rows(live.whole) and id(live.tensor) not in self.wholes:
                self.wholes[id(live.tensor)] = live.whole
                self.parts.append(live.tensor)

    def sizes(self, part: torch.Tensor) -> list[int]:
        """The bytes that each rank has of what this is a part of."""
        shape = self.wholes[id(part)].shape
        of_row = part.dtype.itemsize * shape[1:].numel()
        most = -(-shape[0] // self.ranks)  # as torch.chunk shares them out
        return [max(0, min(most, shape[0] - rank * most)) * of_row for rank in range(self.ranks)]

    def around(self, part: torch.Tensor, rank: int) -> tuple[int, int]:
        """The bytes of the whole that come before those of a rank, and after."""
        if id(part) not in self.wholes:
            return 0, 0
        sizes = self.sizes(part)
        return sum(sizes[:rank]), sum(sizes[rank + 1 :])

    def left(self, places: Sequence[Path]) -> Mapping[int, list[Bytes]]:
        """What the other ranks have left, by the identity of this rank's part; in the order of the ranks.

        Raises:
            OSError: It cannot be read, or is not what it should be.
        """
        found: dict[int, list[Bytes]] = {id(part): [] for part in self.parts}
        for rank, place in enumerate(places, 1):
            sizes = [self.sizes(part)[rank] for part in self.parts]
            size = place.stat().st_size
            if size != sum(sizes):
                raise OSError(f"rank {rank} left {size:,} bytes, and not {sum(sizes):,}: {place}")
            data = np.memmap(place, np.uint8, "r") if size else np.empty(0, np.uint8)
            begins = np.cumsum([0, *sizes]).tolist()[:-1]
            for part, begin, own in zip(self.parts, begins, sizes, strict=True):
                found[id(part)].append(data[begin : begin + own])
        return found


@dataclass(frozen=True, slots=True)
class FullFile:
    """A file of full tensors.

    Attributes:
        name: Its path in the checkpoint.
        put: Writes it to a sink, where the bytes of its tensors are given.
        parts: This rank's part of each of them, by what ``put`` asks for it by.
        begins: Where each of them begins in the file.
    """

    name: str
    put: Callable[[Sink, Content], None]
    parts: Mapping[Hashable, torch.Tensor]
    begins: Mapping[Any, int]

    def writing(self, content: Content) -> Callable[[Sink], None]:
        """What writes it, where the bytes of each tensor are given for this rank's part."""
        return lambda sink: self.put(sink, lambda key: content(self.parts[key]))

    def comparison(self, tensors: Sequence[LiveTensor], rows: Rows, rank: int) -> Provable:
        """How to compare the file that was just written with what it was made of.

        Raises:
            NotLearned: A tensor in it is not known by its digest.
        """
        names: dict[int, str] = {}
        for live in tensors:
            names.setdefault(id(live.tensor), live.name)
        found: dict[Hashable, Part] = {}
        for key, part in self.parts.items():
            if rank == 0 or id(part) in rows.wholes:
                if id(part) not in names:
                    raise NotLearned(f"{self.name}: it has a tensor that shares memory with others")
                before, after = rows.around(part, rank)
                told = names[id(part)], part.dtype, part.shape
                begin = self.begins[key]
                found[key] = Part(begin, *told, after=after) if rank == 0 else Part(begin + before, *told)
        return Comparison(self.name, self.put, found) if rank == 0 else _OwnRows(self.name, tuple(found.values()))


@dataclass(frozen=True, slots=True)
class _OwnRows:
    """As :class:`~hf_lifecycle.saving.files.comparison.Comparison`, of one rank's rows in a file of rank 0's."""

    name: str
    parts: tuple[Part, ...]

    def run(self, folder: Path, digests: Mapping[str, str]) -> None:
        """Compare them. Raises what :meth:`Comparison.run` does."""
        data = np.memmap(folder / self.name, np.uint8, "r")
        for part in self.parts:
            if part.offset + part.size > data.size:
                raise NotLearned(f"{self.name}: it is shorter than expected")
            part.compare(self.name, np.array(data[part.offset : part.offset + part.size]), digests)


def archive_of(name: str, tree: Any, rows: Rows) -> FullFile:
    """The archive of a tree. Its tensors are stood for by others of the same kind that hold nothing."""
    parts: dict[Hashable, torch.Tensor] = {}
    known: dict[int, torch.UntypedStorage] = {}  # by that which a tensor lies in
    storage_of: Any = torch.UntypedStorage

    def stand_in(part: torch.Tensor) -> torch.Tensor:
        whole = rows.wholes.get(id(part))
        # A host writes what it need not gather as it is, with all that its storage holds.
        if (whole is None or rows.ranks == 1) and part.device.type == "cpu":
            live = part.untyped_storage()
            storage = known.setdefault(storage_id(live), storage_of(live.nbytes()))
            is_all = part.is_contiguous() and part.nbytes == live.nbytes()
            parts[storage_id(storage)] = part if is_all else bytes_of(live)
            return torch.empty(0, dtype=part.dtype).set_(storage, part.storage_offset(), part.shape, part.stride())
        like = torch.empty(part.shape if whole is None else whole.shape, dtype=part.dtype, device="meta")
        # A collective gathers as many bytes of each rank as of the first.
        storage = storage_of(like.nbytes if whole is None else rows.sizes(part)[0] * rows.ranks)
        parts[storage_id(storage)] = part
        return torch.empty(0, dtype=part.dtype).set_(storage, 0, like.shape, like.stride())

    archive = TorchArchive(with_tensors(tree, stand_in), Path(name).stem)
    _, begins = archive.places()
    return FullFile(
        name,
        lambda sink, content: archive.write(sink, lambda one: _filled_up(content(storage_id(one)), one.nbytes())),
        {key: parts[key] for key in begins},
        begins,
    )


def _filled_up(data: Bytes, size: int) -> Bytes:
    return data if data.size == size else np.concatenate([data, np.zeros(size - data.size, np.uint8)])


def file_of_layout(name: str, layout: SafetensorsLayout, model: Mapping[str, torch.Tensor]) -> FullFile:
    """A file that is laid out so. Of each tensor of the model, this rank's part is given."""
    return FullFile(
        name,
        lambda sink, content: layout.write(sink, lambda key: torch.from_numpy(content(key))),
        {place.name: model[place.name] for place in layout.places},
        {place.name: begin for begin, place in layout.begins()},
    )


def _is_by_rows(whole: Any) -> bool:
    """Whether a DTensor is shared out, and not the same on all ranks."""
    return is_shared_out(whole) and not all(placement.is_replicate() for placement in whole.placements)


def require_rows(live: LiveTensor, rows: Rows, rank: int) -> None:
    """Raise ``NotLearned`` unless this rank has the rows that it is taken to have, of a tensor that is shared out."""
    if id(live.tensor) not in rows.wholes:
        return
    from torch.distributed.tensor import Shard

    whole: Any = live.whole
    is_by_rows = list(whole.placements) == [Shard(0)] and type(whole.placements[0]) is Shard
    is_in_order = whole.device_mesh.mesh.tolist() == list(range(rows.ranks))
    if not (is_by_rows and is_in_order and live.tensor.nbytes == rows.sizes(live.tensor)[rank]):
        raise NotLearned(f"{live.name} is not shared out by rows over all ranks in their order")
