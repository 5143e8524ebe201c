"""Files that hold the full tensors of a model whose parts the ranks have (``FULL_STATE_DICT``), without a collective.

A host gathers every tensor on rank 0, which writes it. Here the thread of each other rank leaves the bytes of its parts
in a file beside the staging folder, and rank 0's thread writes the host's files from these and from its own snapshot.

Promise: a :class:`FullTemplate` is given only where each rank has its rows of every tensor that is shared out, in the
order of the ranks. That files made of them have the host's bytes, the comparisons that come with it prove, once they
have been run on all ranks: each compares its own rows, and rank 0 everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.files.tree import tensor_bytes
from hf_lifecycle.saving.captured import Provable
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout
from hf_lifecycle.saving.sharded.full_files import FullFile, Rows, archive_of, file_of_layout, require_rows
from hf_lifecycle.saving.sharded.template import Exchange, ShardsPresent, present_of
from hf_lifecycle.saving.sharded.values import Live, Parts, SavedNames, Training, learn_names
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot

__all__ = ["CapturedFull", "FullTemplate", "learn_full"]

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CapturedFull:
    """The files of one save; this rank's parts of their tensors are in a snapshot.

    Attributes:
        trees: What each archive holds, by its path, with this rank's parts; with containers of its own.
        layouts: The files of the first model that are no archives.
        tensors: All parts, with what they are parts of.
        rank: This rank.
        ranks: How many there are.
    """

    trees: Mapping[str, Any]
    layouts: Mapping[str, SafetensorsLayout]
    tensors: Sequence[LiveTensor]
    rank: int
    ranks: int

    def write(self, files: Files, snapshot: Snapshot, exchange: Exchange) -> dict[str, Any]:
        """Leave this rank's parts; on rank 0, wait for those of the others, and write the files.

        Raises:
            OSError: One cannot be written, or read.
        """
        rows = Rows(self.tensors, self.ranks)
        if self.rank:
            with open(exchange.left_by(self.rank), "wb") as file:
                for part in rows.parts:
                    file.write(tensor_bytes(snapshot.tensor(part)).data)
            return {}
        exchange.wait()
        others = rows.left([exchange.left_by(rank) for rank in range(1, self.ranks)])

        def content(part: torch.Tensor) -> Bytes:
            own = tensor_bytes(snapshot.tensor(part))
            left = others.get(id(part))
            return np.concatenate([own, *left]) if left else own

        for one in self.files(rows):
            files.stream(one.name, one.writing(content))
        return {}

    def describe(self, *_: Any) -> None:
        """Nothing is left to be told."""

    def files(self, rows: Rows) -> Iterator[FullFile]:
        """The files."""
        first = next(iter(self.trees.values()))
        for name, tree in self.trees.items():
            yield archive_of(name, tree, rows)
        for name, layout in self.layouts.items():
            yield file_of_layout(name, layout, first)


@dataclass(frozen=True, slots=True)
class FullTemplate:
    """The files that a host writes on rank 0.

    Attributes:
        names: What the values of each training are called.
        layouts: The files of the first model that are no archives, by path.
        ingredients: What they rest on.
        rank: This rank.
        ranks: How many there are.
    """

    names: tuple[SavedNames, ...]
    layouts: Mapping[str, SafetensorsLayout]
    ingredients: Any
    rank: int
    ranks: int

    def captured(self, present: ShardsPresent, parts: Parts) -> CapturedFull:
        """The files made of what is there now, whose ingredients are those of the template."""
        trees: dict[str, Any] = {}
        for own, training, one in zip(self.names, present.trainings, present.each, strict=True):
            trees[training.model_folder] = {fqn: parts.of(one.live[name]) for fqn, name in own.model.items()}
            if training.optimizer is not None:
                trees[training.optimizer_folder] = own.named(one.optimizer)
        return CapturedFull(trees, self.layouts, present.tensors, self.rank, self.ranks)


def learn_full(
    checkpoint: Path,
    rank: int,
    trainings: Sequence[Training],
    parts: Parts,
    *,
    ranks: int,
    layouts: Callable[[Live], Mapping[str, SafetensorsLayout]] | None = None,
) -> tuple[FullTemplate, list[Provable], ShardsPresent]:
    """As :func:`~hf_lifecycle.saving.sharded.template.learn_shards`.

    Args:
        checkpoint: Where the save lies.
        rank: This rank.
        trainings: What was saved.
        parts: Gives this rank's parts.
        ranks: How many ranks there are.
        layouts: Gives the files of the first model that are no archives; it is given its tensors by DCP's names.

    Raises:
        NotLearned: As there, or a file is missing.
    """
    names = tuple(map(learn_names, trainings))
    present = present_of(names, trainings, parts)
    first = {fqn: present.each[0].live[name] for fqn, name in names[0].model.items()}
    rows = Rows(present.tensors, ranks)
    for live in present.tensors:
        require_rows(live, rows, rank)
    template = FullTemplate(names, {} if layouts is None else layouts(first), present.ingredients, rank, ranks)
    captured = template.captured(present, parts)
    missing = [name for name in captured.trees if rank == 0 and not (checkpoint / name).is_file()]
    if missing:
        raise NotLearned(f"{', '.join(missing)}: not written")
    return template, [one.comparison(present.tensors, rows, rank) for one in captured.files(rows)], present
