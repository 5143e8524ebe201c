"""Objects of a run that others take care of, and how a key of a dictionary names one in every process.

An optimizer that keeps its momentum in a dictionary of its own has parameters for keys, what ``id()`` says of them, or
the addresses of their data; a second-order one has modules. Promise: the number of an object is the same in every
process that builds the same models and optimizers in the same order.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch

from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.torch_internals import storage_id

__all__ = ["KINDS_OF_KEYS", "NOTHING_KNOWN", "KnownObjects"]

_SMALLEST_ADDRESS = 1 << 16
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_DEEPEST = 4
_KEYS = {"known": lambda one: one, "id of known": id, "address of known": torch.Tensor.data_ptr}
KINDS_OF_KEYS = frozenset(_KEYS)


class KnownObjects:
    """What is known when values are looked at.

    Args:
        ids: What ``id()`` says of generators and parameters that are not copied, and of objects that are not entered.
        trained: Parameters, in the order of the models and optimizers that hold them.
        models: Whose modules are keys, too.
        optimizers: Whose state changes with each step.
    """

    def __init__(
        self,
        ids: Collection[int] = (),
        trained: Sequence[Any] = (),
        models: Sequence[torch.nn.Module] = (),
        optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> None:
        self._optimizers = optimizers
        self._ids = ids
        self._trained = trained
        self._models = models

    def __contains__(self, one: object) -> bool:
        return one in self._ids

    @cached_property
    def _objects(self) -> list[Any]:
        modules = (module for model in self._models for _, module in modules_of(model))
        return list({id(one): one for one in (*self._trained, *modules)}.values())

    @cached_property
    def _numbers(self) -> dict[int, int]:
        return {id(one): number for number, one in enumerate(self._objects)}

    @cached_property
    def _addresses(self) -> dict[int, int]:
        held = [
            (one.data_ptr(), number) for number, one in enumerate(self._objects) if isinstance(one, torch.nn.Parameter)
        ]
        return {address: number for address, number in held if address}

    @cached_property
    def _storages(self) -> set[int]:
        states = [each for one in self._optimizers for each in list(one.state.values()) if isinstance(each, dict)]
        held = [*self._trained, *(one for each in states for one in list(each.values()))]
        return {storage_id(one) for one in held if type(one) in _PLAIN and is_dense(one) and one.numel()}

    def shares(self, value: Any, depth: int = 0) -> bool:
        """Whether a tensor in ``value`` has the memory of a parameter or of an optimizer's state."""
        kind = type(value)
        if kind in (dict, OrderedDict, list, tuple) and depth < _DEEPEST:
            items = value.values() if kind in (dict, OrderedDict) else value
            return any(self.shares(one, depth + 1) for one in list(items))
        return kind is torch.Tensor and is_dense(value) and storage_id(value) in self._storages

    def node_of(self, key: Any) -> dict[str, Any] | None:
        """How a key names one of these, itself or by its ``id()``; None for another key."""
        kind = type(key)
        if kind is int:
            if key < _SMALLEST_ADDRESS:
                return None
            if key in self._numbers:
                return {"is": "id of known", "of": self._numbers[key]}
            return {"is": "address of known", "of": self._addresses[key]} if key in self._addresses else None
        if not issubclass(kind, (torch.nn.Parameter, torch.nn.Module)) or id(key) not in self._numbers:
            return None
        return {"is": "known", "of": self._numbers[id(key)]}

    def key_of(self, node: dict[str, Any]) -> Any:
        """The key that :meth:`node_of` named; ``IndexError`` where there are not as many now."""
        return _KEYS[node["is"]](self._objects[node["of"]])


NOTHING_KNOWN = KnownObjects()
