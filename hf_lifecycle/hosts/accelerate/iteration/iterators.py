"""Iterators that the program goes through beside the manager's: asked of Python's garbage collector.

They keep a place that no checkpoint has, and start again in a resumed run: ``enumerate``, ``zip`` with a list,
``itertools.islice`` and ``itertools.cycle`` around batches, and loaders that are iterated as they are.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import CodeType, FunctionType, GeneratorType, ModuleType
from typing import Any

import torch

from hf_lifecycle.data.datasets import IterableStream, MapStream
from hf_lifecycle.torch_internals import LOADER_ITERATORS, dataset_of, keeps_workers

__all__ = ["enumerates_batches", "iterators_beside"]

_NOT_ENTERED = (ModuleType, type, FunctionType, CodeType, torch.Tensor, torch.nn.Module, str, int, float)
_MOST = 200  # objects that are looked at on the way from an iterator to the manager's

_BATCHES = 'number the batches with "for number, batch in manager.enumerate(loader)"'
_ADVICE: dict[Any, str] = {
    enumerate: f"enumerate() around batches() starts at 0 again after a resume within an epoch: {_BATCHES}",
    itertools.islice: (
        "itertools.islice() around batches() counts from 0 again after a resume within an epoch: "
        f"{_BATCHES}, and leave the loop at that number"
    ),
    zip: (
        "zip() combines batches() with an iterable that starts from its beginning after a resume within an epoch: "
        f"{_BATCHES}, and index the other iterable with that number"
    ),
    itertools.cycle: (
        "itertools.cycle() replays the batches of its first pass, and a resumed run does not have them: "
        'use a generator that does "while True: yield from manager.batches(loader)"'
    ),
}
_LOADER = (
    "a loader is iterated directly, so its position is not saved, and a resumed run starts it from its beginning: "
    "iterate manager.batches(loader), also with iter() and next()"
)


def enumerates_batches() -> str | None:
    """A sentence if ``enumerate`` goes through the iterator of the manager's that is being asked."""
    is_asked = any(type(one) is enumerate and _reaches(one, _is_running) for one in gc.get_objects())
    return _ADVICE[enumerate] if is_asked else None


def iterators_beside(code: CodeType) -> list[str]:
    """A sentence for each kind of iterator that lives and starts again in a resumed run.

    Args:
        code: Of the manager's iterators, which are generators.
    """
    kinds = {*LOADER_ITERATORS, itertools.islice, zip, itertools.cycle}
    found = [one for one in gc.get_objects() if type(one) in kinds]  # a save waits for it
    return sorted({sentence for one in found for sentence in _said_of(one, code)})


def _said_of(one: Any, code: CodeType) -> Iterator[str]:
    kind = type(one)
    if kind in LOADER_ITERATORS:
        if not (isinstance(dataset_of(one), (MapStream, IterableStream)) or keeps_workers(one)):
            yield _LOADER
    elif kind is itertools.islice:
        if _reaches(one, lambda each: _is_of(each, code)):
            yield _ADVICE[kind]
    elif kind is zip:
        every = [_reaches(each, lambda other: _is_of(other, code)) for each in _members(one)]
        if any(every) and not all(every):
            yield _ADVICE[kind]
    elif kind is itertools.cycle and _reaches(one, _is_batch):
        yield _ADVICE[kind]


def _is_of(one: Any, code: CodeType) -> bool:
    return type(one) is GeneratorType and one.gi_code is code


def _is_running(one: Any) -> bool:
    return type(one) is GeneratorType and one.gi_running


def _is_batch(one: Any) -> bool:
    return isinstance(one, torch.Tensor) and one.ndim > 0 and not isinstance(one, torch.nn.Parameter)


def _members(zipped: Any) -> list[Any]:
    """The iterators of a ``zip``, but for those that give one value for ever."""
    tuples = [one for one in gc.get_referents(zipped) if type(one) is tuple]
    return [
        one for one in max(tuples, key=lambda one: isinstance(one[0], Iterator)) if type(one) is not itertools.repeat
    ]


def _reaches(one: Any, is_it: Callable[[Any], bool]) -> bool:
    """Whether something is reached from an iterator, through others and the objects that hold them."""
    queue: list[Any] = [one]
    seen = {id(one)}
    while queue and len(seen) < _MOST:
        held: Iterable[Any] = gc.get_referents(queue.pop(0))
        for each in held:
            if is_it(each):
                return True
            if id(each) not in seen and not isinstance(each, _NOT_ENTERED):
                seen.add(id(each))
                queue.append(each)
    return False
