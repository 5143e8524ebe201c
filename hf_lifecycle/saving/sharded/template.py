"""What the sharded files of a host's checkpoint are made of: learned from one that it wrote, and made at each save.

Promise: :meth:`ShardTemplate.present` and all that is made of it needs no exchange with other ranks. Where
:attr:`ShardsPresent.ingredients` are those of the template on every rank, ``torch.distributed.checkpoint`` would let
each rank write what it wrote then.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.comparison import Comparison
from hf_lifecycle.saving.sharded.layout import ShardFile, ShardLayout, learn_layout
from hf_lifecycle.saving.sharded.values import Live, Parts, Present, SavedNames, Training, learn_names
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot

__all__ = ["CapturedShards", "Exchange", "ShardTemplate", "ShardsPresent", "learn_shards", "present_of"]

Lengths = Mapping[str, Mapping[str, Sequence[int]]]  # of items, by folder and by file in it


class Exchange(Protocol):
    """What the ranks tell each other of one save, as their threads see it."""

    def left_by(self, rank: int) -> Path:
        """Where a rank leaves bytes for rank 0."""

    def wait(self) -> object:
        """On rank 0: wait until the other ranks have written their parts."""


@dataclass(slots=True)
class CapturedShards:
    """This rank's files of one save; their tensors are in a snapshot."""

    files: tuple[ShardFile, ...]
    _written: Files | None = None  # with them

    def write(self, files: Files, snapshot: Snapshot, _: Exchange) -> dict[str, dict[str, list[int]]]:
        """Write them. Returns the bytes of all items of those files in which any is another than it was."""
        self._written = files
        changed: dict[str, dict[str, list[int]]] = {}
        for one in self.files:
            lengths = files.stream(one.name, functools.partial(one.write, snapshot=snapshot))
            if tuple(lengths) != one.layout.lengths:
                changed[one.layout.folder] = {Path(one.layout.file).name: lengths}
        return changed

    def describe(self, folder: Path, told: Sequence[Lengths]) -> None:
        """Write what tells of the files of all ranks; on one rank, after its own, with what each rank ``told``."""
        assert self._written is not None
        for one in self.files:
            place = one.layout.folder
            lengths = {name: own for rank in told for name, own in rank.get(place, {}).items()}
            self._written.plain(f"{place}/.metadata", one.layout.described(folder / place, lengths))


@dataclass(frozen=True, slots=True)
class ShardsPresent:
    """What there is at a save.

    Attributes:
        each: What there is of each training.
        trainings: These.
        parts: Gives this rank's parts of them.
    """

    each: tuple[Present, ...]
    trainings: tuple[Training, ...]
    parts: Parts

    @property
    def ingredients(self) -> Any:
        """What decides which rank writes what, and which tensor is meant by a name."""
        own = [(list(_ties(one.live)), one.settings) for one in self.each]
        return own, {name: self._kinds(held) for name, held in self.folders.items()}

    def _kinds(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        return [(name, self.parts.kind_of(value)) for name, value in values.items()]

    @property
    def tensors(self) -> list[LiveTensor]:
        """This rank's part of everything."""
        return [tensor for one in self.each for tensor in one.tensors]

    def named(self) -> dict[str, Live]:
        """The tensors of each model, by what their names begin with."""
        return {training.prefix: one.live for training, one in zip(self.trainings, self.each, strict=True)}

    def optimizers(self, snapshot: Snapshot) -> dict[str, Any]:
        """The copy of each optimizer's state, by its name."""
        pairs = zip(self.trainings, self.each, strict=True)
        return {one.name: snapshot.tree(each.optimizer) for one, each in pairs if one.optimizer is not None}

    @property
    def folders(self) -> dict[str, Mapping[str, Any]]:
        """What each folder is made of."""
        return {name: held for one in self.each for name, held in one.folders.items()}


def _ties(live: Live) -> Any:
    first: dict[int, str] = {}
    for name, tensor in live.items():
        yield name, first.setdefault(id(tensor), name), type(tensor), tensor.requires_grad


@dataclass(frozen=True, slots=True)
class ShardTemplate:
    """The sharded files of one rank.

    Attributes:
        names: What the values of each training are called.
        layouts: The files, by folder.
        ingredients: What they rest on.
    """

    names: tuple[SavedNames, ...]
    layouts: Mapping[str, ShardLayout]
    ingredients: Any

    def captured(self, present: ShardsPresent, parts: Parts) -> CapturedShards:
        """The files made of what is there now, whose ingredients are those of the template."""
        return CapturedShards(
            tuple(layout.captured(present.folders[name], parts) for name, layout in self.layouts.items())
        )


def present_of(names: Sequence[SavedNames], trainings: Sequence[Training], parts: Parts) -> ShardsPresent:
    """What there is now of trainings whose names these are. Raises what :meth:`SavedNames.present` does."""
    with parts.renewed():
        each = tuple(own.present(training, parts) for own, training in zip(names, trainings, strict=True))
    return ShardsPresent(each, tuple(trainings), parts)


def learn_shards(
    checkpoint: Path, rank: int, trainings: Sequence[Training], parts: Parts
) -> tuple[ShardTemplate, list[Comparison], ShardsPresent]:
    """Learn from a save that was just made, while everything is still as it was.

    Args:
        checkpoint: Where it lies.
        rank: This rank.
        trainings: What was saved.
        parts: Gives this rank's parts.

    Returns:
        The template, what is to be compared before anything is saved by it, and what there is.

    Raises:
        NotLearned: Something in it is not accounted for.
        TypeError: An optimizer's state holds what is neither a tensor nor plain.
        OSError: A file cannot be read.
    """
    names = tuple(map(learn_names, trainings))
    present = present_of(names, trainings, parts)
    folders = present.folders
    layouts = {name: learn_layout(checkpoint, name, rank, held) for name, held in folders.items()}
    comparisons = [layout.comparison(folders[name], parts, present.tensors) for name, layout in layouts.items()]
    return ShardTemplate(names, layouts, present.ingredients), comparisons, present
