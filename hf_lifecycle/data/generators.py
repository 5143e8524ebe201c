"""Generators that user code owns: found on the objects that make a batch, and made to depend on the epoch or the batch.

A dataset, a collator or a sampler with a ``torch.Generator``, ``numpy.random.Generator``, ``numpy.random.RandomState``
or ``random.Random`` of its own draws from a state that no checkpoint holds. Two rules make it exact:

- Where batches can be made out of order (map-style), each generator is seeded for every batch.
- Where one thing follows another (samplers, iterable datasets), a generator starts each epoch from its own first state
  and the epoch's number; in epoch 0 it is left as it was. Workers that were given equal generators keep equal ones,
  so that data sharded with their help stays sharded.

What a function keeps counts as its own: variables from around it, defaults, and variables of a user's modules that it
names; so does what the methods of a class keep. What hides in a C extension is not found.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.functions import variables_of
from hf_lifecycle.state.values.trees import GENERATORS, GLOBAL_GENERATORS

__all__ = ["OwnedGenerators", "find_generators", "reachable"]

_LEVELS = 6  # Trainer's column filter, Subset, ConcatDataset, a transform and its list are five below the first
_BREADTH = 64  # containers larger than this hold data, not transforms
_LEAVES = (
    *(str, bytes, int, float, complex, bool, type(None), np.ndarray, torch.Tensor, torch.nn.Module),
    *(type, types.ModuleType),
)
_KEEPS_ITS_OWN_EPOCHS = "datasets.iterable_dataset"  # derives its generator from the epoch it was told
_SEED_BITS = (1 << 128) - 1


def children(value: Any) -> Iterator[tuple[str, Any]]:
    """What ``value`` holds, each with the step that leads to it: attributes, items of small containers, variables.

    Of an object of a user's class, what the class holds, and the variables of its methods, count as its own.
    """
    if issubclass(type(value), (dict, list, tuple)):
        base: Any = next(one for one in (dict, list, tuple) if issubclass(type(value), one))  # a user's may be anything
        if base.__len__(value) > _BREADTH:
            return
        items: Any = dict.items(value) if issubclass(type(value), dict) else enumerate(base.__iter__(value))
        yield from ((f"[{key!r}]", item) for key, item in items)
        return
    if issubclass(type(value), (types.MethodType, types.BuiltinMethodType)):  # used as a collator
        yield ".__self__", value.__self__
    if issubclass(type(value), types.FunctionType):
        yield from ((f".{one.name}", one.value) for one in variables_of(value))
    if issubclass(type(value), functools.partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    yield from ((f".{name}", item) for name, item in list(attributes_of(value).items()))
    for kind in type(value).__mro__:
        if is_of_user(kind):
            yield from _of_class(kind)


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    for name, item in list(vars(kind).items()):
        method = getattr(item, "__func__", item)
        if isinstance(method, types.FunctionType):
            yield from ((f".{name}.{one.name}", one.value) for one in variables_of(method))
        elif not name.startswith("__"):
            yield f".{name}", item


def reachable(
    root: Any, name: str, *, levels: int, passed_over: Callable[[Any], bool], ends: type | tuple[type, ...]
) -> Iterator[tuple[str, Any]]:
    """What is reachable from ``root`` by :func:`children`, each once, by path from ``name``; the nearest come first.

    Args:
        levels: How far it is looked, ``root`` included.
        passed_over: Tells what is neither given nor looked into.
        ends: Types of objects that are given and not looked into.
    """
    seen: set[int] = set()
    level = [(name, root)]
    for _ in range(levels):
        below: list[tuple[str, Any]] = []
        for path, value in level:
            if id(value) in seen or passed_over(value):
                continue
            seen.add(id(value))
            yield path, value
            if not issubclass(type(value), ends):
                below += [(path + step, child) for step, child in children(value)]
        level = below


def _passed_over(value: Any) -> bool:
    is_known = id(value) in GLOBAL_GENERATORS or type(value).__module__ == _KEEPS_ITS_OWN_EPOCHS
    return is_known or issubclass(type(value), _LEAVES)


def find_generators(root: Any, name: str, *, make: bool = True) -> dict[str, Any]:
    """The live generators reachable from ``root`` through attributes and small containers, by path from ``name``.

    Generators that are made on first use by ``create_rng()`` (the collators of transformers with ``seed=``) are made
    now, so that the first batch of a process is no exception; with ``make=False`` they are only named, and None.
    """
    found = {}
    for path, value in reachable(root, name, levels=_LEVELS, passed_over=_passed_over, ends=GENERATORS):
        if issubclass(type(value), GENERATORS):
            found[path] = value
        elif callable(getattr(type(value), "create_rng", None)) and _makes_one_later(value):
            if make:
                value.create_rng()
            found[f"{path}.generator"] = value.generator
    return found


def _makes_one_later(collator: Any) -> bool:
    return getattr(collator, "generator", 0) is None and getattr(collator, "seed", None) is not None


class OwnedGenerators:
    """The generators that ``roots`` own, looked for once in each process that makes batches."""

    def __init__(self, **roots: Any) -> None:
        self._roots = roots
        self._found: list[Any] | None = None
        self._first: list[int] | None = None
        self._untouched_until = 1

    def __getstate__(self) -> dict[str, Any]:
        # Another process has copies of its own.
        return {"_roots": self._roots, "_found": None, "_first": None, "_untouched_until": self._untouched_until}

    def names(self) -> list[str]:
        """Where the generators are, as ``collate_fn.generator``."""
        # Not made here: in a process with workers, only the workers can.
        return [path for name, root in self._roots.items() for path in find_generators(root, name, make=False)]

    def _generators(self) -> list[Any]:
        if self._found is None:
            self._found = [g for name, root in self._roots.items() for g in find_generators(root, name).values()]
        return self._found

    def begin_batch(self, seed: int) -> None:
        """Seed every generator, each differently, from the batch's 128-bit ``seed``."""
        for number, generator in enumerate(self._generators(), start=1):
            _seed(generator, (seed + number) & _SEED_BITS)

    def start_from(self, first: Sequence[int] | None) -> list[int]:
        """Seed the generators in every epoch, the first included, as if their first states had the digests ``first``.

        Args:
            first: What this method returned elsewhere; None for the states that the generators have now. Where there
                are other generators now than there, each keeps to its own state.

        Returns:
            The digests.
        """
        self._untouched_until = 0
        if first is not None and len(first) == len(self._generators()):
            self._first = list(first)
        return self._first_states()

    def _first_states(self) -> list[int]:
        if self._first is None:
            self._first = [xxhash.xxh3_128_intdigest(_state_bytes(generator)) for generator in self._generators()]
        return self._first

    def begin_epoch(self, epoch: int) -> None:
        """Let every generator start this epoch from its first state and the epoch's number."""
        self._first_states()
        if epoch >= self._untouched_until:
            assert self._first is not None
            for first, generator in zip(self._first, self._generators(), strict=True):
                _seed(generator, int(xxhash.xxh3_128_intdigest(repr((first, epoch)).encode())))


def _state_bytes(generator: Any) -> bytes:
    if isinstance(generator, torch.Generator):
        return bytes(generator.get_state().numpy().tobytes())
    if isinstance(generator, np.random.Generator):
        return repr(generator.bit_generator.state).encode()
    if isinstance(generator, np.random.RandomState):
        state: Any = generator.get_state()
        return repr((state[1].tobytes(), state[2:])).encode()
    return repr(generator.getstate()).encode()


def _seed(generator: Any, seed: int) -> None:
    words = np.frombuffer(seed.to_bytes(16, "little"), dtype=np.uint32)
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(words).state
    elif isinstance(generator, np.random.RandomState):
        generator.seed(words)
    else:
        generator.seed(seed)
