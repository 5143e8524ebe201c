"""Attributes that a user's code changes as it trains, where each is found again by its path.

A step counter in a trainer, a stage of a curriculum in a callback, the weight of a loss in a closure, the probability
of a dropout: plain values that decide what is trained, and that are in no ``state_dict``. What is entered are objects,
classes and functions of a user's; of a model's modules the scalars are found, whoever wrote them.
"""

from __future__ import annotations

import functools
import io
import itertools
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from enum import EnumMeta
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.bindings import Budget, binding_of
from hf_lifecycle.state.encodings import ITERATORS
from hf_lifecycle.state.fingerprint import is_shared_out
from hf_lifecycle.state.functions import is_of_user, names_stored_by, variables_of
from hf_lifecycle.state.marks import mark_of
from hf_lifecycle.state.modules import modules_of, parameters_of
from hf_lifecycle.state.places import Place
from hf_lifecycle.state.reachable import attributes_of, hooks_of_optimizer, is_of_library, is_stateful
from hf_lifecycle.state.values import PLAIN_SCALARS, WITH_STATE, NotPlain
from hf_lifecycle.torch_internals import OPTIMIZER_MARKS, children_of

__all__ = [
    "Look",
    "Seed",
    "look",
    "seeds_of_optimizer",
    "seeds_of_parameters",
    "seeds_of_sampler",
    "seeds_of_scheduler",
    "seeds_put_on",
]

_DEEPEST = 8
_MOST = 20_000  # objects that are entered
_MOST_ITEMS = 512  # of one container that holds objects
_MODULE_OWN = frozenset(vars(torch.nn.Module())) | {"training"}
_OPTIMIZER_OWN = frozenset({"state", "param_groups", "defaults", "step", OPTIMIZER_MARKS[0]})
_ORDER = frozenset({"weights", "indices"})  # of torch's samplers
_NUMBERS = (int, float, bool)  # what else a configuration has, its owner changes at a save
_CHANGED_IN_PLACE = (
    *(list, dict, set, deque, bytearray, array, itertools.count, io.StringIO, io.BytesIO),
    *(np.ndarray, torch.Tensor, *WITH_STATE, *ITERATORS),
)
_CACHE: Any = type(functools.lru_cache(int))
_LEFT = (EnumMeta, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.nn.Parameter)


Seed = tuple[str, Any, Place | None]  # a path, what is there, and its place if it may be set


@dataclass(frozen=True, slots=True)
class Look:
    """What was found at one moment.

    Attributes:
        places: Where values are, plain ones and others, by their path.
        marks: What differs where a plain value was changed, by path.
        bindings: What differs where another was changed or took its place, by path.
        holders: What holds them, and could hold others, by its path.
        entered: What else was met on the way, by its path.
        left: What ``id()`` says of generators and parameters that others take care of.
    """

    places: Mapping[str, Place]
    marks: Mapping[str, Any]
    bindings: Mapping[str, Any]
    holders: Mapping[str, Any]
    entered: Mapping[str, Any]
    left: Container[int]

    def place(self, holder: str, key: Any) -> Place | None:
        """The place ``key`` in the holder of that path, whether or not there is a value; None without the holder."""
        return Place(self.holders[holder], key, holder) if holder in self.holders else None


def seeds_of_optimizer(optimizer: Any, called: str) -> Iterator[Seed]:
    """What an optimizer keeps beside its state: hooks, a user's function around its step, a user's class's attributes.

    Args:
        optimizer: The optimizer that steps, without what a host has put around it.
        called: What the paths begin with.
    """
    yield from ((key, hooks, None) for key, hooks in hooks_of_optimizer(optimizer, called).items())
    held = attributes_of(optimizer)
    yield f"{called}.step", held.get("step"), None
    if "defaults" in held:
        yield f"{called}.defaults", held["defaults"], Place(optimizer, "defaults", called)
    yield from seeds_put_on(optimizer, called)


def seeds_put_on(owner: Any, called: str) -> Iterator[Seed]:
    """What a user's code keeps in attributes of an object of a library, or of the user's class made from one.

    Args:
        owner: The object, which may get more of them.
        called: What the paths begin with.
    """
    yield called, owner, None
    kind: Any = type(owner)
    left = _set_by_libraries(kind)
    for key, value in list(attributes_of(owner).items()):
        is_private = key.startswith("_") and not is_of_user(kind)
        if not (is_private or key in left or key.endswith("_hooks")):
            yield f"{called}.{key}", value, Place(owner, key, called)


@functools.cache
def _set_by_libraries(kind: type) -> frozenset[str]:
    own = _OPTIMIZER_OWN if issubclass(kind, torch.optim.Optimizer) else frozenset()
    return own.union(*(names_stored_by(one) for one in kind.__mro__ if not is_of_user(one)))


def seeds_of_scheduler(scheduler: Any, called: str) -> Iterator[Seed]:
    """What decides a learning rate and may be in no ``state_dict()``: functions; of a user's class all there is."""
    kind = type(scheduler)
    is_users = is_of_user(kind)
    if is_users:
        yield f"{called}.{kind.__name__}", kind, None
    for key, value in list(attributes_of(scheduler).items()):
        if key != "optimizer" and (is_users or type(value) not in PLAIN_SCALARS):
            yield f"{called}.{key}", value, Place(scheduler, key, called) if is_users else None
    for number, one in enumerate(attributes_of(scheduler).get("_schedulers", ())):
        yield from seeds_of_scheduler(one, f"{called}._schedulers[{number}]")


def seeds_of_parameters(model: torch.nn.Module, called: str) -> Iterator[Seed]:
    """What is kept in attributes of a model's parameters."""
    for name, one in parameters_of(model).items():
        if type(one) is torch.nn.Parameter and one.__dict__ and not is_shared_out(one):
            path = f"{called}.{name}"
            yield from (
                (f"{path}.{key}", held, Place(one, key, path))
                for key, held in list(one.__dict__.items())
                if not key.startswith("_")  # by which libraries mark each other's objects
            )


def seeds_of_sampler(sampler: Any, called: str) -> Iterator[Seed]:
    """A sampler, the samplers in it, and what decides the order that torch's own draw; each ``called`` by its place."""
    while sampler is not None:
        yield called, sampler, None
        if isinstance(sampler, torch.utils.data.Sampler):
            for key in vars(sampler).keys() & _ORDER:
                yield f"{called}.{key}", vars(sampler)[key], Place(sampler, key, called)
        called, sampler = f"{called}.sampler", getattr(sampler, "sampler", None)


def look(seeds: Iterable[Seed], known: Iterable[Any] = (), trained: Iterable[Any] = ()) -> Look:
    """Go through everything that is reached.

    Args:
        seeds: Where to begin: a path, what is there, and its place if it may be set. Of a container without one, and
            of those within it, only the objects are looked at.
        known: Objects that are not entered, and generators that are left alone.
        trained: Parameters that are left alone, since others carry them.
    """
    places: dict[str, Place] = {}
    marks: dict[str, Any] = {}
    bindings: dict[str, Any] = {}
    budget = Budget()
    holders: dict[str, Any] = {}
    entered: dict[str, Any] = {}
    alive = list(known)  # what is made on the way, such as bound methods, too: no identity may be used twice
    seen = set(map(id, alive))
    left = seen.union(map(id, trained))
    most = len(alive) + _MOST
    queue = deque((path, value, place, 0, place is not None) for path, value, place in seeds)
    while queue and len(alive) < most:
        path, value, place, depth, within = queue.popleft()
        if place is not None:
            if not isinstance(place.holder, CellType):
                holders[place.path] = place.holder
            if type(value) in PLAIN_SCALARS:
                places[path], marks[path] = place, value
                continue
            try:
                mark = mark_of(value, left)
            except NotPlain:
                mark = binding_of(value, budget)
                if mark is not None:
                    places[path], bindings[path] = place, mark
            else:
                if issubclass(type(value), _CHANGED_IN_PLACE):
                    if id(value) in seen:  # the same is in another place too
                        continue
                    alive.append(value)
                    seen.add(id(value))
                places[path], marks[path] = place, mark
                if type(value) in (dict, list):
                    holders[path] = value  # it may get objects later
                continue
        if id(value) in seen:
            continue
        if issubclass(type(value), _LEFT):
            if depth == 0:
                holders.setdefault(path, value)  # it may get attributes later
            continue
        entered[path] = value
        alive.append(value)
        seen.add(id(value))
        if is_stateful(value):
            continue
        if not issubclass(type(value), (FunctionType, MethodType)):
            holders.setdefault(path, value)  # it may get attributes later
        if issubclass(type(value), torch.nn.Module):
            _add_scalars(path, value, places, marks, seen)
        within |= not issubclass(type(value), (dict, list, tuple))
        for one in _items(value) if depth < _DEEPEST else ():
            queue.append((one.path(path), one.value, one.place(path) if within else None, depth + 1, within))
    return Look(places, marks, bindings, holders, entered, left)


def _add_scalars(
    called: str, root: torch.nn.Module, places: dict[str, Place], marks: dict[str, Any], seen: set[int]
) -> None:
    """Those of the modules of libraries, of which there are many: a save is stopped for it."""
    of_library: dict[type, bool] = {}
    waiting: list[tuple[str, torch.nn.Module | None]] = [(called, root)]
    while waiting:
        path, module = waiting.pop()
        if module is None or (id(module) in seen and module is not root):
            continue
        seen.add(id(module))
        own, kind = vars(module), type(module)
        if kind not in of_library:
            of_library[kind] = is_of_library(kind)
        if len(own) > len(_MODULE_OWN) and of_library[kind]:
            for key, one in own.items():
                if key not in _MODULE_OWN and type(one) in PLAIN_SCALARS:
                    name = f"{path}.{key}"
                    places[name], marks[name] = Place(module, key, path), one
        waiting += [(f"{path}.{key}", child) for key, child in reversed(children_of(module).items())]


@dataclass(frozen=True, slots=True)
class _Item:
    """What something holds: the steps that lead to its holder and to it, and where it can be set there."""

    step: str
    value: Any
    holder: Any = None
    key: Any = None
    within: str = ""

    def path(self, path: str) -> str:
        return f"{path}{self.within}{self.step}"

    def place(self, path: str) -> Place | None:
        return None if self.holder is None else Place(self.holder, self.key, f"{path}{self.within}")


def _items(value: Any) -> Iterator[_Item]:
    kind = type(value)
    if issubclass(kind, torch.nn.Module):
        yield from _of_model(value)
    elif issubclass(kind, dict):
        for number, (key, one) in enumerate(list(dict.items(value))[:_MOST_ITEMS]):
            holder = value if type(key) in PLAIN_SCALARS else None  # another key has no name that could be saved
            yield _Item(f".{key}" if type(key) in (str, int) else f"[{number}]", one, holder, key)
    elif issubclass(kind, (list, tuple, deque)):
        base = next(one for one in (list, tuple, deque) if issubclass(kind, one))
        holder = value if base is list else None
        for number, one in enumerate(list(itertools.islice(base.__iter__(value), _MOST_ITEMS))):
            yield _Item(f"[{number}]", one, holder, number)
    elif issubclass(kind, functools.partial):
        yield from (_Item("", value.func), _Item(".args", value.args), _Item("", value.keywords))
    elif issubclass(kind, MethodType):
        yield from (_Item("", value.__func__), _Item(".self", value.__self__))
    elif issubclass(kind, FunctionType):
        if not is_of_library(value):
            yield from (_Item(f".{one.name}", one.value, one.holder, one.key) for one in variables_of(value))
    elif kind in (classmethod, staticmethod, _CACHE):
        yield _Item("", value.__wrapped__)
    elif issubclass(kind, weakref.ref):
        yield _Item("", weakref.ref.__call__(value))
    elif kind is ContextVar:
        yield _Item("", value.get(None), value, "")
    elif issubclass(kind, type):
        yield from () if is_of_library(value) else _attributes(value)
    elif issubclass(kind, threading.local) or not is_of_library(kind):
        yield from _attributes(value)
        yield from (_Item(f".{base.__name__}", base) for base in kind.__mro__)
    if issubclass(kind, (dict, list)) and not is_of_library(kind):
        yield from _attributes(attributes_of(value))


def _of_model(model: torch.nn.Module) -> Iterator[_Item]:
    for name, module in modules_of(model):
        if not is_of_library(type(module)):
            within = f".{name}" if name else ""
            yield from (one for one in _attributes(module, within) if one.key not in _MODULE_OWN)
    yield from (one for one in _attributes(getattr(model, "config", None), ".config") if type(one.value) in _NUMBERS)


def _attributes(owner: Any, within: str = "") -> Iterator[_Item]:
    for key, one in list((owner if type(owner) is dict else attributes_of(owner)).items()):
        if not (issubclass(type(owner), type) and key.startswith("__") and not issubclass(type(one), FunctionType)):
            yield _Item(f".{key}", one, owner, key, within)
