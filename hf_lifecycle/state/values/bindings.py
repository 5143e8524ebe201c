"""What differs where something was changed that is no plain value: other functions, other objects, an iterator ahead.

Promise: a look costs little, and calls no method of a user's class. Not seen, since it cannot matter to what is
trained: locks, loggers, bars, files that are written, and what libraries keep for themselves. Not seen either: what an
object in C holds, unless it is an iterator or of a library whose values are pickled here to compare them.
"""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import os
import pickle
import threading
import weakref
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
import xxhash

from hf_lifecycle.bytecode import instructions, names_in
from hf_lifecycle.libraries import LIBRARIES, is_of_user, library_of, module_of
from hf_lifecycle.state.reachable import attributes_of, is_stateful
from hf_lifecycle.state.values.trees import PLAIN_SCALARS, WITH_STATE
from hf_lifecycle.torch_internals import LOADER_ITERATORS, batches_given, version_counter

__all__ = ["Budget", "binding_of", "is_trained"]

_SEEN = frozenset({"PIL", "_thread", "builtins", "datetime", "io", "numpy", "pandas", "torch"})
_SILENT = (LIBRARIES - _SEEN) | {"_asyncio", "_contextvars", "_weakref", "argparse", "evaluate", "os", "peft", "trl"}
_BY_PICKLE = frozenset({"numpy", "pandas", "polars", "pyarrow", "scipy"})
_NAMED = (FunctionType, BuiltinFunctionType, type, torch.nn.Module, torch.optim.Optimizer)
_CONTAINERS = (list, dict, tuple, deque, set, frozenset)
_LOCKS = (type(threading.Lock()), type(threading.RLock()))
_OWN = str(Path(__file__).parents[1]) + os.sep
_OURS = "a pass"
_IN_C = type(int.__add__)
_CACHE = type(functools.lru_cache(int))
_MOST = 64  # items of a container, and objects within an iterator
_DEEPEST = 3
_PICKLED = 1 << 18  # bytes
_MAPPED = 16  # elements of an array in a file, each of which may have to be read from the disk
_LARGEST = 1 << 26  # bytes of an array, of which a copy may be made then
_LARGE = 1 << 14  # what is written at once, of which a sample is taken
_DRAWS = frozenset(
    """
    bernoulli choice choices dropout exponential gauss integers multinomial normal permutation permuted poisson rand
    rand_like randint randint_like randn randn_like random random_sample randperm sample shuffle standard_normal
    uniform
    """.split()  # noqa: SIM905 - a column of names
)


def _is_harmless(value: Any) -> bool:
    """Whether a value is of a kind that cannot matter to what is trained, or that a library sees to."""
    kind = type(value)
    if issubclass(kind, (torch.optim.lr_scheduler.LRScheduler, torch.nn.Parameter, *WITH_STATE, *_LOCKS)):
        return True
    if kind is torch.Tensor and value.grad_fn is not None:
        return True
    root = library_of(module_of(kind))
    if root == "torch":
        return not issubclass(kind, (*_NAMED, torch.Tensor, *LOADER_ITERATORS))
    return root in _SILENT or issubclass(kind, ModuleType)


@dataclass(slots=True)
class Budget:
    """What a look may still take.

    Attributes:
        pickles: How many values may be pickled.
    """

    pickles: int = 16


def is_trained(value: Any) -> bool:
    """Whether it is a module, an optimizer or a parameter, which what looks for what is trained carries or names."""
    return issubclass(type(value), (torch.nn.Module, torch.optim.Optimizer, torch.nn.Parameter))


def binding_of(value: Any, budget: Budget) -> Any:
    """What differs where ``value`` is another one, or has been advanced; None where there is nothing to compare.

    Args:
        value: Any value that is not plain.
        budget: Of one look.
    """
    kind = type(value)
    if is_stateful(value):
        return None
    if issubclass(kind, _NAMED):
        return "is", Same(value)
    if issubclass(kind, MethodType):
        return "method", Same(value.__func__), Same(value.__self__)
    if issubclass(kind, weakref.WeakKeyDictionary):
        return kind, [_itself(one) for one in list(attributes_of(value)["data"].values())[:_MOST]]
    if kind.__module__ == "datasets.arrow_dataset":  # which another takes the place of where rows are added
        return "is", Same(value)
    if _is_harmless(value):
        return None
    if issubclass(kind, functools.partial):
        return "partial", Same(value.func)
    if issubclass(kind, _CACHE):
        return ("cache", value.cache_info().misses) if _draws(value) else None
    if issubclass(kind, torch.Tensor):
        return kind, Same(value), version_counter(value)
    for base in _CONTAINERS:
        if issubclass(kind, base):
            return None if _are_harmless(value, base) else (kind, base.__len__(value), _items_of(value, base))
    root = library_of(module_of(kind))
    if root in _BY_PICKLE:
        return (kind, _of_mapped(value) if issubclass(kind, np.memmap) else _Pickled(value, budget))
    if root == "_queue":
        return kind, value.qsize()
    position = _position(value, 0)
    if position == _OURS:  # which continues by what is known of the pass
        return None
    return (kind, position) if position is not None or is_of_user(kind) else None


class Same:
    """Is equal where it was made for the same object, which it does not keep alive."""

    __slots__ = ("_which",)

    def __init__(self, one: Any) -> None:
        try:
            self._which: Any = weakref.ref(one)
        except TypeError:
            self._which = id(one)

    def __eq__(self, other: object) -> bool:
        # A reference without a callback is the only one of its object; to compare two asks the objects.
        return isinstance(other, Same) and (
            self._which is other._which or (type(self._which) is int and self._which == other._which)
        )

    __hash__ = None  # type: ignore[assignment]


def _are_harmless(value: Any, base: Any) -> bool:
    rows = dict.values(value) if base is dict else base.__iter__(value)
    some = list(itertools.islice(rows, _MOST))
    return bool(some) and all(map(_is_harmless, some))


def _items_of(value: Any, base: Any) -> Any:
    """What of a container's items is in no place of its own: the keys of a dictionary, the items of a tuple."""
    if base is dict:
        pairs = list(itertools.islice(dict.items(value), _MOST))  # at once: other threads may add to it
        return [key if type(key) in PLAIN_SCALARS else (id(key), _itself(one)) for key, one in pairs]
    if base in (tuple, deque):
        return [_itself(one) for one in list(itertools.islice(base.__iter__(value), _MOST))]
    return None


def _itself(one: Any) -> Any:
    kind = type(one)
    if kind in PLAIN_SCALARS:
        return one
    for base in _CONTAINERS:
        if issubclass(kind, base):
            return kind, base.__len__(one)
    return None if _is_harmless(one) else Same(one)


def _draws(cached: Any) -> bool:
    """Whether what is remembered is, by the names in its code, drawn at random."""
    code = getattr(getattr(cached, "__wrapped__", None), "__code__", None)
    return issubclass(type(code), CodeType) and bool(names_in(code) & _DRAWS)


def _position(value: Any, depth: int) -> Any:
    """Where an iterator is, by what it holds; None for what is none."""
    kind = type(value)
    if issubclass(kind, LOADER_ITERATORS):
        return batches_given(value)
    if library_of(module_of(kind)) in ("io", "_io"):
        return _position_in_file(value)
    if type(getattr(kind, "__next__", None)) is not _IN_C:
        return None
    at: Any = repr(value) if kind is itertools.count else None
    if issubclass(kind, GeneratorType):
        if value.gi_code.co_filename.startswith(_OWN):
            return _OURS
        frame = value.gi_frame
        # Where there is one place at which it waits, only what it holds tells how far it is.
        at = None if frame is None else frame.f_lasti * (_yields(value.gi_code) > 1)
    inner = gc.get_referents(value)[:_MOST] if depth < _DEEPEST else []
    if kind is itertools.cycle:
        with suppress(Exception):  # it is an iterator over what it keeps, which newer versions do not tell
            inner += gc.get_referents(value.__reduce__())
    parts = [_part(one, depth + 1) for one in inner if one is not None and not is_trained(one)]
    return _OURS if _OURS in parts else (kind, operator.length_hint(value, 0), at, parts)


@functools.lru_cache(maxsize=1024)
def _yields(code: CodeType) -> int:
    return sum(one.opname.startswith("YIELD") for one in instructions(code))


def _part(one: Any, depth: int) -> Any:
    kind = type(one)
    if kind in PLAIN_SCALARS:
        return one
    if kind in _CONTAINERS:
        inner = one[:_MOST] if kind is tuple and depth < _DEEPEST else ()
        parts = [_part(each, depth + 1) for each in inner]
        return _OURS if _OURS in parts else (kind, len(one), parts)
    return _position(one, depth) or id(kind)


def _of_mapped(array: Any) -> Any:
    """Of an array that lies in a file and may be written to: all of a small one, a few elements of a large one."""
    if array.mode == "r" or array.dtype.hasobject or array.size == 0:
        return None
    step = 1 if array.nbytes <= _LARGE else max(1, array.size // _MAPPED)
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array.flat[::step]).tobytes())


def _position_in_file(file: Any) -> Any:
    """Of a file that is only read."""
    with suppress(OSError, ValueError, AttributeError):
        if file.readable() and not file.writable():
            return os.lseek(file.fileno(), 0, os.SEEK_CUR)
    return None


class _Pickled:
    """Is equal where the first of what is written for a value of a library is the same, or was not written."""

    __slots__ = ("_digest",)

    def __init__(self, value: Any, budget: Budget) -> None:
        is_large = issubclass(type(value), np.ndarray) and value.nbytes > _LARGEST
        budget.pickles -= not is_large
        self._digest = None if is_large or budget.pickles < 0 else _pickled(value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Pickled) and (None in (self._digest, other._digest) or self._digest == other._digest)

    __hash__ = None  # type: ignore[assignment]


def _pickled(value: Any) -> str | None:
    sink = _Sink()
    try:
        pickle.Pickler(sink, protocol=5).dump(value)
    except _Enough:
        pass
    except Exception:  # noqa: BLE001 - of any kind, since it may be the user's that is in it
        return None
    return sink.digest.hexdigest()


class _Enough(Exception):
    pass


class _Sink:
    def __init__(self) -> None:
        self.digest = xxhash.xxh3_128()
        self._left = _PICKLED

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        sample = memoryview(data).cast("B")[:: max(1, size // _LARGE)] if size > _LARGE else data
        self.digest.update(bytes(sample))
        self._left -= min(size, _LARGE)
        if self._left < 0:
            raise _Enough
        return size
