"""Attributes that a user's code changes as it trains, where each is found again by its path.

A step counter in a trainer, a stage of a curriculum in a callback, the weight of a loss in a closure, the probability
of a dropout: plain values that decide what is trained, and that are in no ``state_dict``. What is entered are objects,
classes and functions of a user's; of a model's modules the scalars are found, whoever wrote them.
"""

from __future__ import annotations

import functools
import io
import itertools
import logging
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from enum import EnumMeta
from types import CellType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch

from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.modules import MODULE_OWN, modules_of
from hf_lifecycle.state.reachable import attributes_of, is_of_library, is_stateful
from hf_lifecycle.state.values.additions import EarlierLooks, Item, Seed, functions_put_on, put_on, scalars_of_libraries
from hf_lifecycle.state.values.bindings import Budget, binding_of
from hf_lifecycle.state.values.encodings import ITERATORS
from hf_lifecycle.state.values.functions import is_named_by_user, named_variables, objects_named_by, variables_of
from hf_lifecycle.state.values.known import NOTHING_KNOWN, KnownObjects
from hf_lifecycle.state.values.marks import mark_of
from hf_lifecycle.state.values.places import Place
from hf_lifecycle.state.values.trees import PLAIN_SCALARS, WITH_STATE, NotPlain

__all__ = ["Look", "look"]

logger = logging.getLogger("hf_lifecycle")

_DEEPEST = 8
_MOST = 20_000  # objects that are entered
_MOST_ITEMS = 512  # of one container that holds objects
_NUMBERS = (int, float, bool)  # what else a configuration has, its owner changes at a save
_CHANGED_IN_PLACE = (
    *(list, dict, set, deque, bytearray, array, itertools.count, io.StringIO, io.BytesIO),
    *(np.ndarray, torch.Tensor, *WITH_STATE, *ITERATORS),
)
_CACHE: Any = type(functools.lru_cache(int))
_LEFT = (EnumMeta, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.nn.Parameter)


@dataclass(frozen=True, slots=True)
class Look:
    """What was found at one moment.

    Attributes:
        places: Where values are, plain ones and others, by their path.
        marks: What differs where a plain value was changed, by path.
        bindings: What differs where another was changed or took its place, by path.
        holders: What holds them, and could hold others, by its path.
        entered: What else was met on the way, by its path.
        left: Generators and parameters that others take care of, and what keys may name.
        failed: The paths of what could not be looked at.
        shared: Where a container is that is in another place too, with that one's path, by path.
    """

    places: Mapping[str, Place]
    marks: Mapping[str, Any]
    bindings: Mapping[str, Any]
    holders: Mapping[str, Any]
    entered: Mapping[str, Any]
    left: KnownObjects
    failed: frozenset[str] = frozenset()
    shared: Mapping[str, tuple[Place, str]] = field(default_factory=dict)

    def is_shared(self, path: str) -> bool:
        """Whether the container there is in another place too, so that another value may not become this one."""
        return path in self.shared and issubclass(type(self.shared[path][0].get()), (list, dict, set, deque))

    def place(self, holder: str, key: Any) -> Place | None:
        """The place ``key`` in the holder of that path, whether or not there is a value; None without the holder."""
        held = self.holders.get(holder)
        held = next(
            (one for one in (held, self._module(holder), named_variables(holder, key)) if one is not None), None
        )
        return None if held is None else Place(held, key, holder)

    def _module(self, path: str) -> torch.nn.Module | None:
        """A module of a model that was met, which holds nothing yet."""
        for called, one in self.entered.items():
            if issubclass(type(one), torch.nn.Module) and path.startswith(f"{called}."):
                return dict(modules_of(one)).get(path.removeprefix(f"{called}."))
        return None


def look(
    seeds: Iterable[Seed],
    known: Iterable[Any] = (),
    trained: Iterable[Any] = (),
    holders: Mapping[str, Any] | None = None,
    earlier: EarlierLooks | None = None,
) -> Look:
    """Go through everything that is reached. What cannot be looked at is passed over, which is told once.

    Args:
        seeds: Where to begin: a path, what is there, and its place if it may be set. Of a container without one, and
            of those within it, only the objects are looked at.
        known: Objects that are not entered, and generators that are left alone.
        trained: Parameters that are left alone, since others carry them.
        holders: What could hold a value by its path, whether or not it does.
        earlier: What they have found, to be faster.
    """
    earlier = EarlierLooks() if earlier is None else earlier
    try:
        with earlier.once():
            return _walked(seeds, known, trained, holders, earlier)
    except Exception as error:  # noqa: BLE001 - of any object of a program or a library, and no reason to end training
        _give_up("attributes and variables", error)
        return Look({}, {}, {}, {}, {}, NOTHING_KNOWN, frozenset({""}))


_told: set[str] = set()


def _give_up(what: str, error: Exception) -> None:
    why = f"{type(error).__name__}: {error}"
    if why not in _told:
        _told.add(why)
        logger.warning(
            "not exact: what your code keeps in %s cannot be looked at (%s), so a resumed run starts with its initial "
            "state; please report this with what the debug log has",
            *(what, why),
        )
        logger.debug("the look for changed values failed", exc_info=error)


def _walked(
    seeds: Iterable[Seed],
    known: Iterable[Any],
    trained: Iterable[Any],
    holders: Mapping[str, Any] | None,
    earlier: EarlierLooks,
) -> Look:
    places: dict[str, Place] = {}
    marks: dict[str, Any] = {}
    bindings: dict[str, Any] = {}
    budget = Budget()
    holders = dict(holders or {})
    entered: dict[str, Any] = {}
    alive = list(known)  # what is made on the way, such as bound methods, too: no identity may be used twice
    seen = set(map(id, alive))
    trained, seeds = list(trained), list(seeds)
    models = [one for _, one, _ in seeds if issubclass(type(one), torch.nn.Module)]
    optimizers = [one for _, one, _ in seeds if issubclass(type(one), torch.optim.Optimizer)]
    left = KnownObjects(seen.union(map(id, trained)), trained, models, optimizers)
    most = len(alive) + _MOST
    queue = deque((path, value, place, 0, place is not None) for path, value, place in seeds)
    failed: set[str] = set()
    first_at: dict[int, str] = {}  # the paths of what others may hold too
    shared: dict[str, tuple[Place, str]] = {}

    def visit(path: str, value: Any, place: Place | None, depth: int, within: bool) -> None:
        if place is not None:
            if not isinstance(place.holder, CellType):
                holders[place.path] = place.holder
            if type(value) in PLAIN_SCALARS:
                places[path], marks[path] = place, value
                return
            try:
                mark = mark_of(value, left)
            except NotPlain:
                mark = binding_of(value, budget)
                if mark is not None:
                    places[path], bindings[path] = place, mark
            else:
                if issubclass(type(value), _CHANGED_IN_PLACE):
                    if id(value) in seen:
                        if first_at.get(id(value), path) != path:  # two functions of a property have one path
                            shared[path] = place, first_at[id(value)]
                        return
                    first_at[id(value)] = path
                    alive.append(value)
                    seen.add(id(value))
                places[path], marks[path] = place, mark
                if type(value) in (dict, list):
                    holders[path] = value  # it may get objects later
                return
        if id(value) in seen:
            return
        if issubclass(type(value), _LEFT):
            if depth == 0:
                holders.setdefault(path, value)  # it may get attributes later
            return
        entered[path] = value
        alive.append(value)
        seen.add(id(value))
        if is_stateful(value):
            return
        if not issubclass(type(value), MethodType) and (type(value) is not FunctionType or is_of_user(value)):
            holders.setdefault(path, value)  # it may get attributes later
        if issubclass(type(value), torch.nn.Module):
            _add_scalars(path, value, places, marks, seen)
        within |= not issubclass(type(value), (dict, list, tuple))
        for one in _items(value, earlier) if depth < _DEEPEST else ():
            queue.append((one.path(path), one.value, one.place(path) if within else None, depth + 1, within))

    while queue and len(alive) < most:
        next_one = queue.popleft()
        try:
            visit(*next_one)
        except Exception as error:  # noqa: BLE001 - of any object of a program or a library
            failed.add(next_one[0])
            _give_up(next_one[0], error)
    return Look(places, marks, bindings, holders, entered, left, frozenset(failed), shared)


def _add_scalars(
    called: str, root: torch.nn.Module, places: dict[str, Place], marks: dict[str, Any], seen: set[int]
) -> None:
    """Those of the modules of libraries, of which there are many: a save is stopped for it."""
    found, every, modules = scalars_of_libraries(root, called)
    if seen.isdisjoint(modules - {id(root)}):
        seen |= modules
        places.update(every.places)
        marks.update(every.marks)
        return
    for _, module in modules_of(root):
        if id(module) in seen and module is not root:
            seen.update(id(one) for _, one in modules_of(module))
            continue
        seen.add(id(module))
        if id(module) in found:
            places.update(found[id(module)].places)
            marks.update(found[id(module)].marks)


def _items(value: Any, earlier: EarlierLooks) -> Iterator[Item]:
    kind = type(value)
    if issubclass(kind, torch.nn.Module):
        yield from _of_model(value)
    elif issubclass(kind, dict):
        for number, (key, one) in enumerate(list(dict.items(value))[:_MOST_ITEMS]):
            holder = value if type(key) in PLAIN_SCALARS else None  # another key has no name that could be saved
            yield Item(f".{key}" if type(key) in (str, int) else f"[{number}]", one, holder, key)
    elif issubclass(kind, (list, tuple, deque)):
        base = next(one for one in (list, tuple, deque) if issubclass(kind, one))
        holder = value if base is list else None
        for number, one in enumerate(list(itertools.islice(base.__iter__(value), _MOST_ITEMS))):
            yield Item(f"[{number}]", one, holder, number)
    elif issubclass(kind, functools.partial):
        yield from (Item("", value.func), Item(".args", value.args), Item("", value.keywords))
    elif issubclass(kind, MethodType):
        yield from (Item("", value.__func__), Item(".self", value.__self__))
    elif issubclass(kind, FunctionType):
        if not is_of_library(value):
            for one in variables_of(value):
                beside = "" if one.holder is value else "()"
                yield Item(f".{one.name}", one.value, one.holder, one.key, "", beside, one.within)
            yield from (Item(f".{name}", one) for name, one in objects_named_by(value))
    elif kind in (classmethod, staticmethod, _CACHE):
        yield Item("", value.__wrapped__)
    elif kind is property:
        yield from (Item("", one) for one in (value.fget, value.fset, value.fdel) if one is not None)
    elif kind in (functools.cached_property, functools.partialmethod):
        yield from _attributes(vars(value))
    elif issubclass(kind, weakref.ref):
        yield Item("", weakref.ref.__call__(value))
    elif kind is ContextVar:
        yield Item("", value.get(None), value, "")
    elif issubclass(kind, type):
        yield from earlier.functions_put_on(value) if is_of_library(value) else _attributes(value)
        own: tuple[Any, Any] = (value, kind)  # a class has bases, and so has the class of it
        yield from (Item(f".{base.__name__}", base) for one in own for base in one.__mro__)
    elif issubclass(kind, threading.local) or not is_of_library(kind):
        yield from _attributes(value)
        yield from (Item(f".{base.__name__}", base) for base in kind.__mro__)
    else:
        yield from functions_put_on(value)
        for key, one in put_on(value):
            if is_named_by_user(key):
                yield Item(f".{key}", one, value, key)
    if issubclass(kind, (dict, list)) and not is_of_library(kind):
        yield from _attributes(attributes_of(value))


def _of_model(model: torch.nn.Module) -> Iterator[Item]:
    for name, module in modules_of(model):
        if not is_of_library(type(module)):
            within = f".{name}" if name else ""
            yield from (one for one in _attributes(module, within) if one.key not in MODULE_OWN)
    yield from (one for one in _attributes(getattr(model, "config", None), ".config") if type(one.value) in _NUMBERS)


def _attributes(owner: Any, within: str = "") -> Iterator[Item]:
    is_class = issubclass(type(owner), type)
    for key, one in list((owner if type(owner) is dict else attributes_of(owner)).items()):
        if not (is_class and key.startswith("__") and not issubclass(type(one), FunctionType)):
            yield Item(f".{key}", one, owner, key, within)
