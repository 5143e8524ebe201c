"""Attributes that a user's code changes as it trains, where each is found again by its path.

A step counter in a trainer, a stage of a curriculum in a callback, the weight of a loss in a closure, the probability
of a dropout: plain values that decide what is trained, and that are in no ``state_dict``. What is entered are objects,
classes and functions of a user's; of a model's modules the scalars are found, whoever wrote them.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import EnumMeta
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.functions import is_of_user, variables_of
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.state.reachable import attributes_of, hooks_of_optimizer, is_of_library, is_stateful
from hf_lifecycle.state.values import GENERATORS, PLAIN_SCALARS, NotPlain, mark_of

__all__ = ["Look", "Place", "Seed", "look", "seeds_of_optimizer", "seeds_of_sampler"]

_DEEPEST = 8
_MOST = 20_000  # objects that are entered
_MOST_ITEMS = 512  # of one container that holds objects
_MODULE_OWN = frozenset(vars(torch.nn.Module())) | {"training"}
_OPTIMIZER_OWN = frozenset({"state", "param_groups", "defaults", "step", "_opt_called"})
_ORDER = frozenset({"weights", "indices"})  # of torch's samplers
_NUMBERS = (int, float, bool)  # what else a configuration has, its owner changes at a save
_CHANGED_IN_PLACE = (list, dict, set, deque, np.ndarray, torch.Tensor, *GENERATORS)
_LEFT = (EnumMeta, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.nn.Parameter)


@dataclass(slots=True)  # not frozen, which takes three times as long to make
class Place:
    """Where a value is: an attribute, an item, a variable of a closure or of a module.

    Attributes:
        holder: The object, class, function, container or cell that holds it.
        key: Its name or index there; of a function the number of a default.
        path: That of the holder.
    """

    holder: Any
    key: Any
    path: str

    def get(self) -> Any:
        """The value; ``KeyError``, ``IndexError`` or ``ValueError`` where there is none."""
        if isinstance(self.holder, CellType):
            return self.holder.cell_contents
        if isinstance(self.holder, FunctionType) and isinstance(self.key, int):
            return (self.holder.__defaults__ or ())[self.key]
        return (self.holder if isinstance(self.holder, (dict, list)) else attributes_of(self.holder))[self.key]

    def mark(self) -> Any:
        """What differs where the value was changed; None where there is none."""
        try:
            return mark_of(self.get())
        except (KeyError, IndexError, ValueError, NotPlain):
            return None

    def put(self, value: Any) -> None:
        """Set the value."""
        if isinstance(self.holder, CellType):
            self.holder.cell_contents = value
        elif isinstance(self.holder, type):
            setattr(self.holder, self.key, value)
        elif isinstance(self.holder, FunctionType) and isinstance(self.key, int):
            defaults = list(self.holder.__defaults__ or ())
            defaults[self.key] = value
            self.holder.__defaults__ = tuple(defaults)
        else:
            (self.holder if isinstance(self.holder, (dict, list)) else attributes_of(self.holder))[self.key] = value


Seed = tuple[str, Any, Place | None]  # a path, what is there, and its place if it may be set


@dataclass(frozen=True, slots=True)
class Look:
    """What was found at one moment.

    Attributes:
        places: Those whose value may be plain, by their path.
        marks: What differs where a value was changed, by path.
        holders: What holds them, and could hold others, by its path.
    """

    places: Mapping[str, Place]
    marks: Mapping[str, Any]
    holders: Mapping[str, Any]

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
    if is_of_user(type(optimizer)):
        for key, value in list(held.items()):
            if key not in _OPTIMIZER_OWN and not key.endswith("_hooks"):
                yield f"{called}.{key}", value, Place(optimizer, key, called)


def seeds_of_sampler(sampler: Any, called: str) -> Iterator[Seed]:
    """A sampler, the samplers in it, and what decides the order that torch's own draw; each ``called`` by its place."""
    while sampler is not None:
        yield called, sampler, None
        if isinstance(sampler, torch.utils.data.Sampler):
            for key in vars(sampler).keys() & _ORDER:
                yield f"{called}.{key}", vars(sampler)[key], Place(sampler, key, called)
        called, sampler = f"{called}.sampler", getattr(sampler, "sampler", None)


def look(seeds: Iterable[Seed], known: Iterable[Any] = ()) -> Look:
    """Go through everything that is reached.

    Args:
        seeds: Where to begin: a path, what is there, and its place if it may be set. Of a container without one, and
            of those within it, only the objects are looked at.
        known: Objects that are not entered, and generators that are left alone.
    """
    places: dict[str, Place] = {}
    marks: dict[str, Any] = {}
    holders: dict[str, Any] = {}
    alive = list(known)  # what is made on the way, such as bound methods, too: no identity may be used twice
    left = frozenset(map(id, alive))
    seen = set(left)
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
                marks[path] = mark_of(value, left)
            except NotPlain:
                marks.pop(path, None)
            else:
                if isinstance(value, _CHANGED_IN_PLACE):
                    if id(value) in seen:  # the same is in another place too
                        del marks[path]
                        continue
                    alive.append(value)
                    seen.add(id(value))
                places[path] = place
                continue
        if id(value) in seen or isinstance(value, _LEFT) or is_stateful(value):
            continue
        alive.append(value)
        seen.add(id(value))
        if hasattr(type(value), "__dict__") and not isinstance(value, (FunctionType, MethodType)):
            holders.setdefault(path, value)  # it may get attributes later
        if isinstance(value, torch.nn.Module):
            _add_scalars(path, value, places, marks, seen)
        within |= not isinstance(value, (dict, list, tuple))
        for one in _items(value) if depth < _DEEPEST else ():
            queue.append((one.path(path), one.value, one.place(path) if within else None, depth + 1, within))
    return Look(places, marks, holders)


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
        waiting += [(f"{path}.{key}", child) for key, child in reversed(module._modules.items())]


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
    if isinstance(value, torch.nn.Module):
        yield from _of_model(value)
    elif isinstance(value, dict):
        for number, (key, one) in enumerate(list(value.items())[:_MOST_ITEMS]):
            holder = value if type(key) in PLAIN_SCALARS else None  # another key has no name that could be saved
            yield _Item(f".{key}" if isinstance(key, (str, int)) else f"[{number}]", one, holder, key)
        if not is_of_library(type(value)):
            yield from _attributes(value)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value[:_MOST_ITEMS]):
            yield _Item(f"[{number}]", one, value if type(value) is list else None, number)
    elif isinstance(value, functools.partial):
        yield from (_Item("", value.func), _Item(".args", value.args), _Item("", value.keywords))
    elif isinstance(value, MethodType):
        yield from (_Item("", value.__func__), _Item(".self", value.__self__))
    elif isinstance(value, FunctionType):
        if not is_of_library(value):
            yield from (_Item(f".{one.name}", one.value, one.holder, one.key) for one in variables_of(value))
    elif isinstance(value, type):
        yield from () if is_of_library(value) else _attributes(value)
    elif not is_of_library(type(value)):
        yield from _attributes(value)
        yield from (_Item(f".{kind.__name__}", kind) for kind in type(value).__mro__)


def _of_model(model: torch.nn.Module) -> Iterator[_Item]:
    for name, module in modules_of(model):
        if not is_of_library(type(module)):
            within = f".{name}" if name else ""
            yield from (one for one in _attributes(module, within) if one.key not in _MODULE_OWN)
    yield from (one for one in _attributes(getattr(model, "config", None), ".config") if type(one.value) in _NUMBERS)


def _attributes(owner: Any, within: str = "") -> Iterator[_Item]:
    for key, one in list(attributes_of(owner).items()):
        if not (isinstance(owner, type) and key.startswith("__") and not isinstance(one, FunctionType)):
            yield _Item(f".{key}", one, owner, key, within)
