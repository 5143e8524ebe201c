"""Where looks for values that a user's code changes begin: what no walk from a model, a trainer or a program comes to.

Attributes put on an object of a library's class, on optimizers and parameters, and what a ``state_dict()`` leaves out.
Promise: an attribute counts as the user's where no function of the libraries' classes of the object sets one of that
name. Libraries mark each other's objects by private names: such a name counts only where the user's code has it.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch

from hf_lifecycle.bytecode import names_stored_by
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.fingerprint import is_shared_out
from hf_lifecycle.state.modules import MODULE_OWN, ModelWalks, kept_of_model, modules_of, parameters_of
from hf_lifecycle.state.reachable import attributes_of, hooks_of_optimizer, is_of_library
from hf_lifecycle.state.values.functions import is_named_by_user
from hf_lifecycle.state.values.places import Place
from hf_lifecycle.state.values.trees import PLAIN_SCALARS
from hf_lifecycle.torch_internals import OPTIMIZER_MARKS

__all__ = [
    "EarlierLooks",
    "Item",
    "Seed",
    "functions_put_on",
    "put_on",
    "scalars_of_libraries",
    "seeds_of_classes",
    "seeds_of_libraries",
    "seeds_of_optimizer",
    "seeds_of_parameters",
    "seeds_of_sampler",
    "seeds_of_scheduler",
    "seeds_of_stateless",
    "seeds_put_on",
]

_OF_EVERY_MODULE = len(vars(torch.nn.Module()))
_OPTIMIZER_OWN = frozenset({"state", "param_groups", "defaults", "step", OPTIMIZER_MARKS[0]})
_ORDER = frozenset({"weights", "indices"})  # of torch's samplers
_CARRIED = (torch.nn.Module, torch.nn.Parameter, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
Seed = tuple[str, Any, Place | None]  # a path, what is there, and its place if it may be set


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


def seeds_of_classes(*objects: Any) -> Iterator[Seed]:
    """The classes of objects, in the place of whose methods a user's code may have put functions of its own."""
    yield from ((kind.__name__, kind, None) for one in objects for kind in type(one).__mro__)


def seeds_of_libraries(put: Mapping[str, Any]) -> Iterator[Seed]:
    """What a user has ``put`` into libraries, by its name, and the settings of torch that decide how it computes."""
    yield from ((name, one, None) for name, one in put.items())
    for name, setting in _SETTINGS.items():
        with suppress(RuntimeError, AttributeError):  # in a build of torch, or beside a newer setting
            yield name, setting.get(), setting


class _Setting(Place):
    """A setting of torch: the holder is what gets it and what sets it."""

    __slots__ = ()

    def get(self) -> Any:
        return self.holder[0]()

    def put(self, value: Any) -> None:
        self.holder[1](value)


def _attribute(of: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    return lambda: getattr(of, name), lambda value: setattr(of, name, value)


_cuda: Any = torch.backends.cuda
_GET_AND_SET: dict[str, tuple[Any, Any]] = {
    "default_dtype": (
        lambda: str(torch.get_default_dtype()),
        lambda name: torch.set_default_dtype(getattr(torch, name.rpartition(".")[2])),
    ),
    "deterministic_debug_mode": (torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode),
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "num_threads": (torch.get_num_threads, torch.set_num_threads),
    **{f"cudnn.{name}": _attribute(torch.backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark")},
    "mkldnn.enabled": _attribute(torch.backends.mkldnn, "enabled"),
    **{
        f"{name}_sdp": (getattr(_cuda, f"{name}_sdp_enabled"), getattr(_cuda, f"enable_{name}_sdp"))
        for name in ("flash", "mem_efficient", "math", "cudnn")
        if hasattr(_cuda, f"enable_{name}_sdp")
    },
}
_SETTINGS = {f"torch {name}": _Setting(pair, name, "torch") for name, pair in _GET_AND_SET.items()}


def seeds_put_on(owner: Any, called: str, *, named: bool = False) -> Iterator[Seed]:
    """What a user's code keeps in attributes of an object of a library, or of the user's class made from one.

    Args:
        owner: The object, which may get more of them.
        called: What the paths begin with.
        named: Whether only those count that the user's code sets by name, since libraries share the object.
    """
    yield called, owner, None
    is_users = is_of_user(type(owner))
    for key, value in put_on(owner):
        if not (named or key.startswith("_")) or is_users or is_named_by_user(key):  # asked last: it takes longest
            yield f"{called}.{key}", value, Place(owner, key, called)


def put_on(owner: Any) -> Iterator[tuple[str, Any]]:
    """The attributes of an object that no library's class of it sets."""
    kind: Any = type(owner)
    left = _set_by_libraries(kind)
    for key, value in list(attributes_of(owner).items()):
        if type(key) is str and key not in left and not key.startswith("__") and not key.endswith("_hooks"):
            yield key, value


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
                if not _is_library_method(held, one) and (not key.startswith("_") or is_named_by_user(key))
            )


def _is_library_method(value: Any, owner: Any) -> bool:
    """Whether a library has bound this to its owner, as DeepSpeed does to parameters: it holds nothing more."""
    return type(value) is MethodType and value.__self__ is owner and not is_of_user(value.__func__)


def seeds_of_sampler(sampler: Any, called: str) -> Iterator[Seed]:
    """A sampler, the samplers in it, and what decides the order that torch's own draw; each ``called`` by its place."""
    while sampler is not None:
        yield called, sampler, None
        if isinstance(sampler, torch.utils.data.Sampler):
            for key in vars(sampler).keys() & _ORDER:
                yield f"{called}.{key}", vars(sampler)[key], Place(sampler, key, called)
        called, sampler = f"{called}.sampler", getattr(sampler, "sampler", None)


def seeds_of_stateless(one: Any, called: str) -> Iterator[Seed]:
    """What an object of a user's class holds whose ``state_dict()`` is empty, closures of its functions included."""
    if is_of_user(type(one)) and not one.state_dict():
        yield f"{called}.{type(one).__name__}", type(one), None
        for key, value in list(attributes_of(one).items()):
            if not isinstance(value, _CARRIED):
                yield f"{called}.{key}", value, Place(one, key, called)


class Item(NamedTuple):  # many are made, which takes a dataclass three times as long
    """What something holds: the steps that lead to its holder and to it, and where it can be set there.

    A variable that a function names is set elsewhere than in the function, whose attributes may have the same names.
    """

    step: str
    value: Any
    holder: Any = None
    key: Any = None
    within: str = ""
    elsewhere: str = ""
    named: str = ""  # what is found by a name of its own, wherever that is

    def path(self, path: str) -> str:
        return f"{path}{self.within}{self.step}"

    def place(self, path: str) -> Place | None:
        within = self.named or f"{path}{self.within}{self.elsewhere}"
        return None if self.holder is None else Place(self.holder, self.key, within)


class EarlierLooks(ModelWalks):
    """What was found in libraries, where most is as it was. What was there is kept: no identity is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self._untouched: dict[type, list[Any]] = {}

    def functions_put_on(self, kind: type) -> list[Item]:
        """What a user's code has put in the place of methods of a library's class."""
        now = list(vars(kind).values())
        if _are_same(now, self._untouched.get(kind, [])):
            return []
        found = list(functions_put_on(kind))
        if not found:
            self._untouched[kind] = now
        return found


@dataclass(frozen=True, slots=True)
class Scalars:
    """Where they are, and which, by their paths."""

    places: dict[str, Place]
    marks: dict[str, Any]


@functools.partial(kept_of_model, reads_plain_values=True)
def scalars_of_libraries(root: torch.nn.Module, called: str) -> tuple[dict[int, Scalars], Scalars, frozenset[int]]:
    """What modules of libraries hold: each by its ``id()``, and all together; and the ``id()`` of every module."""
    found: dict[int, Scalars] = {}
    every = Scalars({}, {})
    of_library: Any = functools.cache(is_of_library)  # of types, which mypy does not take for hashable
    for name, module in modules_of(root):
        own = vars(module)
        if len(own) <= _OF_EVERY_MODULE or not of_library(type(module)):
            continue
        path = f"{called}.{name}" if name else called
        keys = [
            key
            for key in own.keys() - MODULE_OWN
            # A private name: what a library keeps there holds in its own process alone.
            if type(own[key]) in PLAIN_SCALARS and (not key.startswith("_") or is_named_by_user(key))
        ]
        places = {f"{path}.{key}": Place(module, key, path) for key in keys}
        found[id(module)] = Scalars(places, {f"{path}.{key}": own[key] for key in keys})
        every.places.update(places)
        every.marks.update(found[id(module)].marks)
    return found, every, frozenset(id(module) for _, module in modules_of(root))


def _are_same(now: list[Any], before: list[Any]) -> bool:
    return len(now) == len(before) and all(map(operator.is_, now, before))


def functions_put_on(owner: Any) -> Iterator[Item]:
    """What a user's code has put in the place of methods of a library's object or class."""
    for key, one in list(attributes_of(owner).items()):
        function = one.__func__ if issubclass(type(one), MethodType) else one
        while type(function) is FunctionType:
            if is_of_user(function):
                yield Item(f".{key}", function)
                break
            function = vars(function).get("__wrapped__")  # torch wraps the step of each class of optimizers
