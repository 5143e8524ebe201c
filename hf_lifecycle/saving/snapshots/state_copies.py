"""Copies of an optimizer's state, one at each save, of which most is as it was at the save before.

Promise: a copy is :func:`~hf_lifecycle.saving.files.archive.plain_copy` of the state, and its tensors are what
:func:`~hf_lifecycle.saving.snapshots.live.tensors_in` finds in it. Where the states of all parameters are the same
objects, and lie where they did, the copy of these is the last one.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lifecycle.saving.files.archive import plain_copy
from hf_lifecycle.saving.snapshots.live import tensors_in
from hf_lifecycle.saving.snapshots.placement import LiveTensor

__all__ = ["StateCopies"]

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
