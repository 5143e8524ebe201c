"""Values without code: numbers, text, tensors, arrays, generators, values of standard types, and containers of these.

Promise: what :func:`copied` accepts can be stored as a tree, from which :mod:`hf_lifecycle.state.values.restoring`
makes the same. Of a user's own classes are members of an ``Enum``, named tuples and other containers and numbers:
their fields are stored, beside the name of the class.
"""

from __future__ import annotations

import functools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, Flag
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.state.modules import PLAIN_SCALARS
from hf_lifecycle.state.reachable import attributes_of, is_of_library
from hf_lifecycle.state.values.encodings import ENCODINGS, ITERATORS, name_of, shared_bytes_of
from hf_lifecycle.state.values.known import NOTHING_KNOWN, KnownObjects

__all__ = [
    "FACTORIES",
    "GENERATORS",
    "GLOBAL_GENERATORS",
    "LARGEST",
    "PLAIN_SCALARS",
    "WITH_STATE",
    "NotPlain",
    "Walk",
    "copied",
]

# What is behind ``random.random``, ``np.random.rand`` and the like belongs to no one.
_BOUND_TO_GLOBAL: tuple[Any, ...] = (random.random, np.random.rand)
GLOBAL_GENERATORS = frozenset({id(one.__self__) for one in _BOUND_TO_GLOBAL} | {id(torch.default_generator)})
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
WITH_STATE = (*GENERATORS, np.random.BitGenerator)
_ROWS = (list, tuple, deque, set, frozenset)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_BASES = (OrderedDict, defaultdict, Counter, dict, *_ROWS, int, float, str, bytes)
FACTORIES = (int, float, str, bool, list, dict, set)  # of a ``defaultdict``
_FACTORY: Any = vars(defaultdict)["default_factory"]
_MOST = 10_000  # values in one
LARGEST = 1 << 30  # bytes of one tensor or array
_LARGEST_RESULT = 1 << 20  # of one that a computation left behind: larger ones are made anew at each step
_SMALL = 100, 1 << 14  # values, and bytes of one tensor or array
_DEEPEST = 12  # a file holds three levels for each
_TENSORS: dict[type, str] = {torch.Tensor: "tensor", torch.nn.Parameter: "parameter"}


class NotPlain(Exception):
    """A value that is not copied; the message says why.

    Attributes:
        is_large: Whether it is for its size alone.
    """

    def __init__(self, why: str, *, is_large: bool = False) -> None:
        super().__init__(why)
        self.is_large = is_large


def _refuse(value: Any, depth: int) -> Any:  # noqa: ARG001
    raise NotPlain(f"a {type(value).__qualname__} is not a plain value")


@dataclass(slots=True)
class Walk:
    """How a tree is made: how many values may still come, how large a tensor may be, and what becomes of each kind.

    Attributes:
        values: How many values may come.
        size: Bytes of one tensor or array.
        tensor: Makes a leaf of a tensor.
        array: Makes a leaf of an array.
        left: Generators and parameters that are not plain here, and what keys may name.
        at_once: So many values that lie side by side count as one.
        iterator: Makes a leaf of an iterator; without it, what is left of it is stored.
        other: Makes a node of what is not plain, at its depth, or raises.
    """

    values: int
    size: int
    tensor: Callable[[Any], Any]
    array: Callable[[Any], Any]
    left: KnownObjects = NOTHING_KNOWN
    at_once: int = 1
    iterator: Callable[[Any], Any] | None = None
    other: Callable[[Any, int], Any] = _refuse

    def take(self, count: int) -> None:
        self.values -= count
        self.require(0)

    def require(self, count: int) -> None:
        """Raise if even side by side there is no room for so many."""
        if count > self.values * self.at_once:
            raise NotPlain(f"it has more than {_MOST} values", is_large=True)

    def admit(self, size: int) -> None:
        if size > self.size:
            raise NotPlain(f"it has {size / 2**20:.0f} MB", is_large=True)

    def tree(self, value: Any, depth: int = 0) -> Any:
        kind: Any = type(value)
        if kind in PLAIN_SCALARS:
            return value
        if depth > _DEEPEST:
            raise NotPlain("it is nested too deeply")
        if kind in _ROWS:
            node = {"is": kind.__name__, "of": self._rows(list(value), len(value), depth, kind)}
            return node if kind is not deque else {**node, "made": value.maxlen}
        if kind in _MAPPINGS:
            node = {"is": kind.__name__, "of": self._pairs(value, depth)}
            return node if kind is not defaultdict else {**node, "made": _factory(value)}
        if kind is torch.Tensor or (kind is torch.nn.Parameter and id(value) not in self.left):
            return self._of_tensor(value)
        if issubclass(kind, np.ndarray) and not issubclass(kind, (np.memmap, np.ma.MaskedArray)):
            return self._of_array(value, depth)
        if issubclass(kind, np.generic) and value.dtype.kind in "biufc":
            return value
        if issubclass(kind, Enum):
            is_flag = issubclass(kind, Flag)
            return {"is": "member", "of": value._value_ if is_flag else value._name_, "class": name_of(kind)}
        if issubclass(kind, WITH_STATE) and id(value) not in GLOBAL_GENERATORS and id(value) not in self.left:
            return {"is": "generator", "of": self.tree(_state_of(value), depth + 1)}
        if kind in ENCODINGS:
            return self._encoded(value, kind, depth)
        if base_of(kind) is not None:
            return self._of_class(value, kind, depth)
        shared = shared_bytes_of(value)
        if shared is not None:
            return {"is": "shared", "of": shared}
        return self.other(value, depth)

    def _rows(self, rows: list[Any], count: int, depth: int, kind: type = list) -> list[Any]:
        self.require(count)  # another thread may add to it
        if PLAIN_SCALARS.issuperset(map(type, rows)) and not (kind is set and any(map(self.left.node_of, rows))):
            self.take(1 + len(rows) // self.at_once)
            return rows
        self.take(count)
        if kind in (set, frozenset):
            return [self._key(one, depth) for one in rows]
        return [self.tree(one, depth + 1) for one in rows]

    def _pairs(self, mapping: Any, depth: int) -> list[Any]:
        self.take(dict.__len__(mapping))
        return [[self._key(key, depth), self.tree(one, depth + 1)] for key, one in list(dict.items(mapping))]

    def _key(self, key: Any, depth: int) -> Any:
        named = self.left.node_of(key)
        if named is not None:
            return named
        node = self.tree(key, depth + 1)
        kind: Any = type(key)
        if type(node) is dict and node["is"] == "object" and kind.__hash__ is object.__hash__:
            raise NotPlain("its keys are objects that are compared by identity")
        return node

    def _of_class(self, value: Any, kind: type, depth: int) -> dict[str, Any]:
        """Of a container or number of a class of the user's, whose own methods are not called."""
        base: Any = base_of(kind)
        content: Any
        if issubclass(base, dict):
            content = self._pairs(value, depth)
        elif base in _ROWS:
            content = self._rows(list(base.__iter__(value)), base.__len__(value), depth, base)
        else:
            exact = {int: int.__int__, float: float.__float__, str: str.__str__}
            content = exact[base](value) if base in exact else bytes.__getitem__(value, slice(None))
        held = attributes_of(value)
        fields = {str(key): self.tree(one, depth + 1) for key, one in list(held.items())} if held else {}
        made = value.maxlen if base is deque else _factory(value) if base is defaultdict else None
        return {"is": base.__name__, "of": content, "class": name_of(kind), "fields": fields, "made": made}

    def _encoded(self, value: Any, kind: type, depth: int) -> dict[str, Any]:
        self.take(1)
        row = ENCODINGS[kind]
        if self.iterator is not None and kind in ITERATORS:
            return {"is": kind.__qualname__, "of": self.iterator(value)}
        try:
            content = row.take(value)
        except (ValueError, SyntaxError, TypeError) as error:
            raise NotPlain(f"a {kind.__qualname__}: {error}") from error
        if row.of_values:
            content = self._rows(content, len(content), depth)
        return {"is": f"{kind.__module__}.{kind.__qualname__}", "of": content}

    def _of_tensor(self, value: torch.Tensor) -> dict[str, Any]:
        if not is_dense(value):
            raise NotPlain("it is not a plain tensor")
        size = value.numel() * value.element_size()
        self.admit(size)
        if value.grad_fn is not None and size > _LARGEST_RESULT:
            raise NotPlain(f"it is the result of a computation, of {size / 2**20:.0f} MB")
        where = value.device.type
        leaf = value.requires_grad and value.is_leaf
        return {"is": _TENSORS[type(value)], "of": self.tensor(value), "on": where, "leaf": leaf}

    def _of_array(self, value: Any, depth: int) -> dict[str, Any]:
        value = np.asarray(value)  # of no class of the user's
        self.admit(value.nbytes)
        if value.dtype.hasobject:
            if value.dtype.kind != "O":
                raise NotPlain("it is an array of records with objects")
            self.require(value.size)
            return {
                "is": "objects",
                "of": self._rows(value.reshape(-1).tolist(), value.size, depth),
                "shape": value.shape,
            }
        if value.dtype.kind in "biufc":
            return {"is": "array", "of": self.array(value)}
        octets = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        kind = np.lib.format.dtype_to_descr(value.dtype)
        return {"is": "records", "of": self.array(octets), "shape": value.shape, "dtype": kind}


def _factory(mapping: Any) -> str | None:
    """What a ``defaultdict`` makes, where a name tells that; empty where it does not."""
    made = _FACTORY.__get__(mapping)
    return None if made is None else made.__name__ if made in FACTORIES else ""


def copied(
    value: Any,
    depth: int = 0,
    *,
    small: bool = False,
    left: KnownObjects = NOTHING_KNOWN,
    other: Callable[[Any, int], Any] = _refuse,
) -> Any:
    """A copy in host memory, as a tree of the plain kinds that a file can hold.

    Args:
        value: What is copied.
        depth: How deep it lies in what is copied.
        small: Refuse what would take long at every step.
        left: Generators and parameters that others take care of, and what keys may name.
        other: Makes a node of what is not plain, at its depth, or raises.

    Raises:
        NotPlain: It holds something that has code, or is too large.
    """
    most = _SMALL if small else (_MOST, LARGEST)
    walk = Walk(*most, lambda tensor: tensor.detach().to("cpu", copy=True), np.array, left=left, other=other)
    return walk.tree(value, depth)


@functools.lru_cache(maxsize=4096)
def base_of(kind: type) -> type | None:
    """The standard type that a class of the user's is made from, of those whose values are stored; or None."""
    if is_of_library(kind):
        return None
    return next((base for base in _BASES if issubclass(kind, base)), None)


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    version, words, gauss = random.Random.getstate(generator)
    return [version, np.array(words, dtype=np.uint64), gauss]
