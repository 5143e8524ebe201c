"""Which tensors a snapshot is of, and where they lie: found once, for as long as they stay there.

To ask each tensor for its storage, its place and an alias takes as long as all else that a save is stopped for.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from hf_lifecycle.torch_internals import storage_id

__all__ = ["LiveTensor", "Placement"]


class LiveTensor(NamedTuple):
    """A tensor to be copied.

    Attributes:
        name: What a message calls it, and what its copy is asked for by; no two have the same.
        tensor: A dense tensor that holds data.
        at_once: Whether anything but an optimizer's step may write to it.
        is_alias: Whether nobody else has this object, so that it lies where it does, whatever becomes of others.
        whole: The tensor that is written to where this is a part of it: of a DTensor's part no version counter tells.
    """

    name: str
    tensor: torch.Tensor
    at_once: bool
    is_alias: bool = False
    whole: torch.Tensor | None = None


Storages = list[tuple[torch.UntypedStorage, list[LiveTensor]]]


class Parted(NamedTuple):
    """When the storages of a placement are copied.

    Attributes:
        at_once: The numbers of those that are copied at once.
        later: Of those that a thread copies.
        watched: The tensors in these: those that others have too, and those that nobody else has.
    """

    at_once: list[int]
    later: list[int]
    watched: tuple[list[LiveTensor], list[LiveTensor]]


class Placement:
    """Where some tensors lie.

    Attributes:
        storages: The storages, each once, with the tensors that lie in it.
        slots: The number of each, by its :func:`~hf_lifecycle.torch_internals.storage_id`.
        places: By a tensor's name the number of its storage, and an alias of it, which stays where it is.
    """

    def __init__(self, tensors: Iterable[LiveTensor]) -> None:
        found: dict[int, tuple[torch.UntypedStorage, list[LiveTensor]]] = {}
        self._tensors = list(tensors)
        for live in self._tensors:
            storage = live.tensor.untyped_storage()
            found.setdefault(storage_id(storage), (storage, []))[1].append(live)
        self.storages: Storages = list(found.values())
        self.slots = {number: slot for slot, number in enumerate(found)}
        self.places = {
            live.name: (slot, live.tensor if live.is_alias else live.tensor.detach())
            for slot, (_, owners) in enumerate(self.storages)
            for live in owners
        }
        self.devices = {storage.device for storage, _ in self.storages}
        self._aliases = [self.places[live.name][1] for live in self._tensors]
        self._dtypes = [alias.dtype for alias in self._aliases]
        self._parted: tuple[int, Parted] | None = None

    @property
    def sizes(self) -> list[int]:
        """Bytes of each storage."""
        return [storage.nbytes() for storage, _ in self.storages]

    def is_of(self, tensors: Sequence[LiveTensor]) -> bool:
        """Whether these are the same tensors, and lie where they did."""
        if len(tensors) != len(self._tensors) or not all(map(_is_same, tensors, self._tensors)):
            return False
        self._tensors = list(tensors)  # who asks again at this save has these very objects
        live = [one.tensor for one in tensors]
        return all(map(torch.Tensor.is_set_to, live, self._aliases)) and [one.dtype for one in live] == self._dtypes

    def parted(self, written_between: set[str], *, overlap: bool) -> Parted:
        """When each storage is copied.

        Args:
            written_between: The names of tensors that are copied at once; it only grows.
            overlap: Whether any is copied later.
        """
        if not overlap:
            return Parted(list(range(len(self.storages))), [], ([], []))
        if self._parted is None or self._parted[0] != len(written_between):
            parted = Parted([], [], ([], []))
            for number, (_, owners) in enumerate(self.storages):
                if any(live.at_once or live.name in written_between for live in owners):
                    parted.at_once.append(number)
                else:
                    parted.later.append(number)
                    for live in owners:
                        parted.watched[live.is_alias].append(live)
            self._parted = len(written_between), parted
        return self._parted[1]


def _is_same(one: LiveTensor, other: LiveTensor) -> bool:
    return one is other or (one.tensor is other.tensor and one.whole is other.whole and _told(one) == _told(other))


def _told(live: LiveTensor) -> tuple[str, bool, bool]:
    return live.name, live.at_once, live.is_alias
