"""Counters, lists and other plain values in variables of the program start again in a resumed run, and are named.

What they tell of may be this process alone, so they are not restored. Promise: where a run that was resumed begins to
train, those that begin with another value than they had at the save are named in one warning, with both values. Quiet
is what the program has set as it was, what never changed, and what it read from a clock. Environment variables that
the program sets and counters in variables of modules are among them.

Iterators that the program goes through beside the manager's keep a place that no checkpoint has: ``enumerate``, ``zip``
with a list, ``itertools.islice`` and ``itertools.cycle`` around batches, and loaders that are iterated as they are.
They are asked of Python's garbage collector and named at the first save, and ``enumerate`` where it starts again.
"""

from __future__ import annotations

import gc
import itertools
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, GeneratorType, ModuleType
from typing import Any

import torch

from hf_lifecycle.data.datasets import IterableStream, MapStream
from hf_lifecycle.messages import few
from hf_lifecycle.state.values.functions import is_named_by_user
from hf_lifecycle.state.values.marks import Clocks
from hf_lifecycle.state.values.variables import values_of_program
from hf_lifecycle.torch_internals import LOADER_ITERATORS, dataset_of, keeps_workers

__all__ = ["ProgramVariables", "enumerates_batches", "iterators_beside"]

logger = logging.getLogger("hf_lifecycle")

_OF_PROCESS = "environment variable "
_LONGEST = 60  # letters of a value


class ProgramVariables:
    """Of one run.

    Args:
        known: Gives what others carry or name.
        batches: The code of the manager's iterators.
    """

    def __init__(self, known: Callable[[], Iterable[Any]], batches: CodeType) -> None:
        self._known = known
        self._batches = batches
        self._has_saved = False
        self._clocks = Clocks()
        self._first: dict[str, str] = {}  # as the run, or its first pass, began
        self._lasting: set[str] = set()  # those that were there before the epochs, or the first pass without any
        self._saved: Mapping[str, str] = {}
        self._to_tell = False  # of what was loaded
        self._has_begun = False

    def begin_run(self) -> None:
        """The loop over epochs is about to begin."""
        new = self._values()
        self._lasting |= new.keys() - self._first.keys()
        self._first = {**new, **self._first}

    def begin_pass(self, inside: bool) -> None:
        """A pass is about to begin, or (``inside``) the rest of one."""
        if self._has_begun and not self._to_tell:
            return
        now = self._values()
        self._first = {**now, **self._first}
        self._has_begun = True
        if self._to_tell:
            self._to_tell = False
            self._tell({name: text for name, text in now.items() if inside or name in self._lasting})
            sentence = enumerates_batches() if inside else None
            if sentence is not None:
                logger.warning("maybe not exact: %s", sentence)

    def _tell(self, now: Mapping[str, str]) -> None:
        other = [name for name in sorted(self._saved) if now.get(name, self._saved[name]) != self._saved[name]]
        if other:
            logger.warning(
                "maybe not exact: variables of your program have other values than at the save: %s; if training "
                "depends on them, keep them in an object that you pass as objects=, or use manager.progress",
                few([f"{name} ({_change(self._saved[name], now[name])})" for name in other]),
            )

    def state_dict(self) -> dict[str, str]:
        """Those that have changed, in an earlier process too."""
        if not self._has_saved:
            self._has_saved = True
            for sentence in iterators_beside(self._batches):
                logger.warning("maybe not exact: %s", sentence)
        now = self._values(self._first)
        changed = {
            name: text for name, text in now.items() if name in self._saved or text != self._first.get(name, "None")
        }
        of_others = [one for one in changed if one.startswith(_OF_PROCESS)]
        left = {one for one in of_others if not is_named_by_user(one.removeprefix(_OF_PROCESS))}
        return {name: text for name, text in changed.items() if name not in left}

    def load_state_dict(self, saved: Mapping[str, str]) -> None:
        """Compare with ``saved`` when the next pass begins."""
        self._saved, self._to_tell = dict(saved), True

    def _values(self, wanted: Mapping[str, str] | None = None) -> dict[str, str]:
        passed = {id(one) for one in self._known()}
        found = values_of_program(passed, wanted, lambda value: type(value) is float and self._clocks.gave(value))
        before = [one for one in (*self._first, *self._saved) if one.startswith(_OF_PROCESS)]
        names = {*before, *(f"{_OF_PROCESS}{one}" for one in os.environ)}
        return found | {name: repr(os.environ.get(name.removeprefix(_OF_PROCESS)))[:_LONGEST] for name in sorted(names)}


def _change(was: str, now: str) -> str:
    """What became of a value, in words; digests of its content are left out."""
    before, after = (re.sub(r" [0-9a-f]{8}$", "", text) for text in (was, now))
    return f"{after} with other values" if before == after else f"was {before}, is {after}"


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
