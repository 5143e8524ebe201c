"""Copies of the states of an optimizer and of users' objects, one at each save; what was made before is used again.

Promise: the copy of an optimizer's state is :func:`~hf_lifecycle.saving.files.archive.plain_copy` of it, and its
tensors are what :func:`~hf_lifecycle.saving.snapshots.live.tensors_in` finds in it. Where the states of all parameters
are the same objects, and lie where they did, the copy of these is the last one.

Users' states go into host memory that is kept from save to save. Memory that is new costs several times what a copy to
it costs, and training waits for both: an average of the weights is as large as a model. Promise: a copy is apart from
what it is of, and stays as it is until the next one is made, or the memory is given back.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lifecycle.saving.files.archive import plain_copy
from hf_lifecycle.saving.snapshots.live import settled_copy, tensors_in, tensors_of
from hf_lifecycle.saving.snapshots.memory import Arena, available_memory
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.task import Task
from hf_lifecycle.state.gathering import is_dense

__all__ = ["StateCopies", "StateMemory"]

_NAME, _STATE = "optimizer", "state"


class StateCopies:
    """Copies the state of one optimizer.

    The paths of its tensors begin with ``optimizer``.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Keep nothing any more."""
        self._kept: list[Any] | None = None  # the parameters' states and what is in them, if all of it is known
        self._keys: list[Any] = []
        self._live: list[torch.Tensor] = []
        self._aliases: list[torch.Tensor] = []
        self._kinds: list[Any] = []
        self._copies: dict[int, Any] = {}
        self._copy: Any = None
        self._tensors: list[LiveTensor] = []

    def of(self, tree: Any) -> tuple[Any, list[LiveTensor]]:
        """The copy of what ``state_dict()`` gave, and its tensors.

        Raises:
            TypeError: It holds what is neither a tensor nor plain.
        """
        state = tree.get(_STATE) if type(tree) is dict else None
        if type(state) is not dict or not all(type(row) is dict for row in state.values()):
            copy = plain_copy(tree)
            return copy, tensors_in(copy, _NAME)
        if not self._is_as_it_was(state):
            self._begin_anew(state)
        copy = plain_copy(tree, {**self._copies, id(state): self._copy})
        tensors: list[LiveTensor] = []
        for key, value in copy.items():
            tensors += self._tensors if value is self._copy else tensors_in(value, f"{_NAME}.{key}")
        return copy, tensors

    def _begin_anew(self, state: dict[Any, Any]) -> None:
        self.clear()
        self._copy = {key: plain_copy(row, self._copies) for key, row in state.items()}
        self._tensors = tensors_in(self._copy, f"{_NAME}.{_STATE}")
        pairs = [
            (one, copy)
            for row, copied in zip(state.values(), self._copy.values(), strict=True)
            for one, copy in zip(row.values(), copied.values(), strict=True)
        ]
        if all(type(one) is torch.Tensor or one is copy for one, copy in pairs):  # no containers, which may change
            self._kept, self._keys = _objects_in(state)
            tensors = [(one, copy) for one, copy in pairs if type(one) is torch.Tensor]
            self._live, self._aliases = [one for one, _ in tensors], [copy for _, copy in tensors]
            self._kinds = _kinds_of(self._live)

    def _is_as_it_was(self, state: dict[Any, Any]) -> bool:
        objects, keys = _objects_in(state)
        return (
            self._kept is not None
            and list(map(id, objects)) == list(map(id, self._kept))
            and keys == self._keys
            and all(map(torch.Tensor.is_set_to, self._live, self._aliases))
            and _kinds_of(self._live) == self._kinds
        )


def _objects_in(state: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    """The states of the parameters and what is in them, and the keys of all."""
    objects, keys = list(state.values()), list(state)
    for row in state.values():
        objects += row.values()
        keys += row
    return objects, keys


def _kinds_of(tensors: list[torch.Tensor]) -> list[Any]:
    return [one.dtype for one in tensors] + [one.requires_grad for one in tensors]


_LARGE = 1 << 18  # bytes of a tensor that is copied here
_ROOM = 2.5  # of what it takes must be free: while it is made, there is a copy beside it


class StateMemory:
    """Makes one copy after the other; whoever reads one is done with it when the next is asked for.

    The first copy of a state lies in memory of its own. That which is kept is made by a thread meanwhile.
    """

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._devices: list[torch.device] = []
        self._making: Task | None = None

    def copy_of(self, tree: Any) -> Any:
        """As :func:`~hf_lifecycle.saving.snapshots.live.settled_copy`, large tensors in kept memory where they fit."""
        large = {id(one): one for one in tensors_of(tree) if _is_large(one)}
        sizes = [one.numel() * one.element_size() for one in large.values()]
        devices = sorted({one.device for one in large.values() if one.device.type == "cuda"}, key=str)
        if self._making is not None and self._making.failure() is not None:
            self._arena = None
        self._making = None
        if self._arena is None or not self._arena.fits(sizes) or devices != self._devices:
            self._make_room(sizes, devices)
            return settled_copy(tree)
        copies: dict[int, torch.Tensor] = {}
        for slot, (number, one) in enumerate(large.items()):
            copies[number] = self._arena.slot(slot).view(one.dtype).reshape(one.shape)
            copies[number].copy_(one.detach(), non_blocking=True)
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
        return settled_copy(tree, copies)

    def _make_room(self, sizes: list[int], devices: list[torch.device]) -> None:
        self._arena, self._devices = None, devices  # the old one goes before the new one comes
        free = available_memory() if sizes else 0
        if free is not None and free <= sum(sizes) * _ROOM:
            return

        def make() -> None:
            self._arena = Arena(sizes, device=next(iter(devices), None))

        self._making = Task(make, "hf_lifecycle-memory")

    def release(self) -> None:
        """Give the memory back."""
        if self._making is not None:
            self._making.join()
        self._arena = self._making = None


def _is_large(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_dense(tensor)
    return plain and tensor.device.type in ("cpu", "cuda") and tensor.numel() * tensor.element_size() >= _LARGE
