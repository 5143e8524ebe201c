"""Values without code: numbers, text, tensors, arrays, generators, and containers of these.

Promise: what :func:`copied` accepts can be stored as a tree, and :func:`given_back` makes the live value equal to it,
in place where it is a container, a tensor or a generator. Of a user's own class is nothing but members of an ``Enum``.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Container
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.fingerprint import tensor_digest

__all__ = [
    "GENERATORS",
    "GLOBAL_GENERATORS",
    "PLAIN_SCALARS",
    "NotPlain",
    "copied",
    "given_back",
    "has_only_grown",
    "mark_of",
]

PLAIN_SCALARS = frozenset({bool, int, float, str, bytes, type(None)})
# What is behind ``random.random``, ``np.random.rand`` and the like belongs to no one.
_BOUND_TO_GLOBAL: tuple[Any, ...] = (random.random, np.random.rand)
GLOBAL_GENERATORS = frozenset({id(one.__self__) for one in _BOUND_TO_GLOBAL} | {id(torch.default_generator)})
GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)
_ROWS = (list, tuple, deque, set, frozenset)
_MAPPINGS = (dict, OrderedDict, defaultdict, Counter)
_MOST = 10_000  # values in one
_MOST_MARKED = 1_250  # nodes of one that are compared; training waits for it
_LARGEST = 1 << 30  # bytes of one tensor or array
_SMALL = 100, 1 << 14  # values, and bytes of one tensor or array
_SAMPLE = 512  # elements
_FIRST = 64  # items of a large dictionary
_OF_A_ROW = 8
_DEEPEST = 20


class NotPlain(Exception):
    """A value that is not copied; the message says why.

    Attributes:
        is_large: Whether it is for its size alone.
    """

    def __init__(self, why: str, *, is_large: bool = False) -> None:
        super().__init__(why)
        self.is_large = is_large


@dataclass(slots=True)
class _Limit:
    """How many values may still come, how large a tensor or an array may be, and which objects are not plain here."""

    values: int = _MOST
    size: int = _LARGEST
    left: Container[int] = frozenset()
    at_once: int = 1  # so many values that lie side by side count as one

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


def copied(value: Any, *, small: bool = False) -> Any:
    """A copy in host memory, as a tree of the plain kinds that a file can hold.

    Args:
        value: What is copied.
        small: Refuse what would take long at every step.

    Raises:
        NotPlain: It holds something that has code, or is too large.
    """
    limit = _Limit(*_SMALL) if small else _Limit()
    return _tree(value, limit, 0, lambda tensor: tensor.detach().to("cpu", copy=True), np.copy)


def mark_of(value: Any, left: Container[int] = frozenset()) -> Any:
    """What differs where a value was changed; a sample of what is large.

    Args:
        value: Any value.
        left: What ``id()`` says of generators that others take care of.

    Raises:
        NotPlain: It holds something that has code.
    """
    if type(value) in PLAIN_SCALARS:
        return value
    try:
        return type(value), _tree(value, _Limit(_MOST_MARKED, left=left, at_once=8), 0, _mark_of_tensor, _mark_of_array)
    except NotPlain as why:
        if not why.is_large:
            raise
        return type(value), "large", *_sampled(value)


def _sampled(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return (_mark_of_tensor(value),)
    if isinstance(value, np.ndarray):
        return (_mark_of_array(value),)
    if isinstance(value, dict):
        return len(value), [(key, _itself(one)) for key, one in itertools.islice(value.items(), _FIRST)]
    if isinstance(value, (list, tuple)):
        return len(value), [_itself(one) for one in value[:: max(1, len(value) // _SAMPLE)]]
    return (len(value),)


def _itself(one: Any, depth: int = 0) -> Any:
    if type(one) in PLAIN_SCALARS:
        return one
    if depth == 0 and type(one) in (dict, list, tuple):  # a row, which may be changed in place
        held = one.values() if type(one) is dict else one
        return id(one), len(one), [_itself(each, 1) for each in itertools.islice(held, _OF_A_ROW)]
    return id(one)


def has_only_grown(before: Any, now: Any) -> bool:
    """Whether a dictionary, by these marks, has what it had, and perhaps more behind it, as a cache has."""
    if not (isinstance(before, tuple) and isinstance(now, tuple) and issubclass(before[0], dict)):
        return False
    if before[0] is not now[0] or len(before) != len(now):
        return False
    if before[1] == "large":
        return bool(before[2] <= now[2] and before[3] == now[3])
    return bool(now[1]["of"][: len(before[1]["of"])] == before[1]["of"])


def _mark_of_tensor(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().reshape(-1)
    sample = flat[:: max(1, flat.numel() // _SAMPLE)]
    return tensor.shape, tensor._version, tensor.data_ptr(), tensor_digest(sample)


def _mark_of_array(array: Any) -> Any:
    flat = array.reshape(-1) if array.nbytes <= 1 << 20 else array.reshape(-1)[:: array.size // _SAMPLE]
    return array.shape, array.dtype.str, flat.tobytes()


def _tree(value: Any, limit: _Limit, depth: int, tensor: Callable[[Any], Any], array: Callable[[Any], Any]) -> Any:
    kind = type(value)
    if kind in PLAIN_SCALARS:
        return value
    if depth > _DEEPEST:
        raise NotPlain("it is nested too deep")

    def below(one: Any) -> Any:
        return _tree(one, limit, depth + 1, tensor, array)

    if kind in _ROWS:
        limit.require(len(value))
    if kind in _ROWS and PLAIN_SCALARS.issuperset(map(type, rows := list(value))):  # another thread may add to it
        limit.take(1 + len(rows) // limit.at_once)
        return {"is": kind.__name__, "of": rows}
    if kind in _ROWS or kind in _MAPPINGS:
        limit.take(len(value))
    if kind in _ROWS:
        return {"is": kind.__name__, "of": [below(one) for one in rows]}
    if kind in _MAPPINGS:
        return {"is": kind.__name__, "of": [[below(key), below(one)] for key, one in list(value.items())]}
    if kind is torch.Tensor:
        if value.grad_fn is not None or value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise NotPlain("it is the result of a computation, or no plain tensor")
        limit.admit(value.numel() * value.element_size())
        return {"is": "tensor", "of": tensor(value)}
    if kind is np.ndarray and value.dtype.kind in "biufc":
        limit.admit(value.nbytes)
        return {"is": "array", "of": array(value)}
    if isinstance(value, np.generic) and value.dtype.kind in "biufc":
        return value
    if isinstance(value, Enum):
        return {"is": "member", "of": value.name}
    if kind in GENERATORS and id(value) not in GLOBAL_GENERATORS and id(value) not in limit.left:
        return {"is": "generator", "of": below(_state_of(value))}
    raise NotPlain(f"a {kind.__qualname__} is no plain value")


def given_back(own: Any, tree: Any) -> Any:
    """The value that was copied, in the container, tensor or generator ``own`` where it is of the same kind.

    Raises:
        NotPlain: ``own`` is of a kind in which it cannot be.
    """
    if not isinstance(tree, dict):
        return tree
    kind, content = tree["is"], tree["of"]
    same = type(own).__name__ == kind
    if kind in ("tensor", "array"):
        return _in_place(own, content)
    if kind == "member":
        if not isinstance(own, Enum):
            raise NotPlain("it is no member of an Enum now")
        return type(own)[content]
    if kind == "generator":
        _set_state(own, given_back(None, content))
        return own
    if kind in {one.__name__ for one in _ROWS}:
        made = [given_back(None, one) for one in content]
        if kind in ("tuple", "frozenset"):
            return tuple(made) if kind == "tuple" else frozenset(made)
        rows: Any = own if same else {"list": [], "set": set(), "deque": deque()}[kind]
        rows.clear()
        rows.update(made) if kind == "set" else rows.extend(made)
        return rows
    pairs = [(given_back(None, key), one) for key, one in content]
    before = dict(own) if same else {}
    mapping: Any = own if same else {"OrderedDict": OrderedDict(), "Counter": Counter()}.get(kind, {})
    mapping.clear()
    for key, one in pairs:
        mapping[key] = given_back(before.get(key), one)
    return mapping


def _in_place(own: Any, saved: Any) -> Any:
    """``saved`` in the memory of ``own``, which others may hold too; on its device where the shape is another."""
    fits = type(own) is type(saved) and own.shape == saved.shape and own.dtype == saved.dtype
    if isinstance(saved, torch.Tensor):
        if not fits:
            return saved.to(own.device) if isinstance(own, torch.Tensor) else saved
        with torch.no_grad():
            own.copy_(saved)
        return own
    if not (fits and own.flags.writeable):
        return saved
    own[...] = saved
    return own


def _state_of(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    version, words, gauss = generator.getstate()
    return [version, np.array(words, dtype=np.uint64), gauss]


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate((state[0], tuple(int(word) for word in state[1]), state[2]))
    else:
        raise NotPlain("it is no generator now")
