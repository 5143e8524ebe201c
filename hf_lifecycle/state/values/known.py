"""Objects of a run that others take care of, and how a key of a dictionary names one in every process.

An optimizer that keeps its momentum in a dictionary of its own has parameters for keys, what ``id()`` says of them, or
the addresses of their data; a second-order one has modules. Promise: the number of an object is the same in every
process that builds the same models and optimizers in the same order.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import torch

from hf_lifecycle.state.modules import modules_of

__all__ = ["KINDS_OF_KEYS", "NOTHING_KNOWN", "KnownObjects"]

_SMALLEST_ADDRESS = 1 << 16
_KEYS = {"known": lambda one: one, "id of known": id, "address of known": torch.Tensor.data_ptr}
KINDS_OF_KEYS = frozenset(_KEYS)


class KnownObjects:
    """What is known when values are looked at.

    Args:
        ids: What ``id()`` says of generators and parameters that are not copied, and of objects that are not entered.
        trained: Parameters, in the order of the models and optimizers that hold them.
        models: Whose modules are keys, too.
    """

    def __init__(
        self, ids: Collection[int] = (), trained: Sequence[Any] = (), models: Sequence[torch.nn.Module] = ()
    ) -> None:
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
