"""Copies of users' states in host memory that is kept from save to save.

Memory that is new costs several times what a copy to it costs, and training waits for both: an average of the weights
is as large as a model. Promise: a copy is apart from what it is of, and stays as it is until the next one is made, or
the memory is given back.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lifecycle.saving.snapshots.live import settled_copy, tensors_of
from hf_lifecycle.saving.snapshots.memory import Arena, available_memory
from hf_lifecycle.saving.task import Task
from hf_lifecycle.state.gathering import is_dense

__all__ = ["StateMemory"]

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
