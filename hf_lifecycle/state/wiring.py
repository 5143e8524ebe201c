"""What models are made of beside their values: modules, parameters, hooks, and methods that an object has of its own.

Code that changes it while training runs registers a hook, replaces a parameter or a ``forward``: that is in no file of
a checkpoint, and a resumed run builds its models without it. Promise: such a change is named, once. Hooks of libraries
are left out. Not promised: that what is taken back before a save is seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch

from hf_lifecycle.messages import few
from hf_lifecycle.state.fingerprint import is_shared_out
from hf_lifecycle.state.modules import kept_of_model, modules_of
from hf_lifecycle.state.reachable import hooks_of, is_of_library
from hf_lifecycle.torch_internals import MODULE_PARTS

__all__ = ["Wiring"]

_FUNCTIONS = frozenset({FunctionType, MethodType})


class Wiring:
    """Of the models of one run, which ``models`` gives by name."""

    def __init__(self, models: Callable[[], Mapping[str, torch.nn.Module]]) -> None:
        self._models = models
        self._first: dict[str, dict[str, Any]] = {}  # by the name of the model

    def take_first(self) -> None:
        """Models that were not there at an earlier call are as they are at first."""
        for name, model in self._models().items():
            if name not in self._first:
                self._first[name] = _marks(model, name)

    def changed(self) -> str | None:
        """A sentence that names what has changed since it was at first, or since the last call."""
        found: list[str] = []
        for name, model in self._models().items():
            first, now = self._first.get(name), _marks(model, name)
            if first is not None:
                found += [path for path in {**first, **now} if _differ(first.get(path), now.get(path))]
                self._first[name] = now
        if not found:
            return None
        return (
            "the structure of the model changes during training, and a resumed run builds it without that change: "
            f"{few(found)}; make the change before training starts, or in every run at its start"
        )

    def release(self) -> None:
        """Hold nothing any more."""
        self._first = {}


def _marks(model: torch.nn.Module, called: str) -> dict[str, Any]:
    """What differs where something is another one, by its path; no object is kept alive."""
    hooks = {key: [id(one) for one in each if _is_users(one)] for key, each in hooks_of(model, called).items()}
    return {key: ids for key, ids in hooks.items() if ids} | _structure(model, called)


@kept_of_model
def _structure(model: torch.nn.Module, called: str) -> dict[str, Any]:
    _, parameters, buffers = MODULE_PARTS
    marks: dict[str, Any] = {}
    for name, module in modules_of(model):
        path = f"{called}.{name}" if name else called
        held = vars(module)
        marks[path] = weakref.ref(module)
        for key, one in held.get(parameters, {}).items():
            if one is not None and not is_shared_out(one):
                marks[f"{path}.{key}"] = weakref.ref(one)
        marks.update((f"{path}.{key}", True) for key, one in held.get(buffers, {}).items() if one is not None)
        for key, one in held.items() if not _FUNCTIONS.isdisjoint(map(type, held.values())) else ():
            if (
                type(one) in _FUNCTIONS
                and hasattr(type(module), key)
                and _is_users(one)
                and not _is_own(one, module, key)
            ):
                marks[f"{path}.{key}"] = id(getattr(one, "__func__", one))
    return marks


def _differ(first: Any, now: Any) -> bool:
    # A reference without a callback is the only one of its object; to compare two asks the objects.
    return first is not now and (isinstance(first, weakref.ref) or isinstance(now, weakref.ref) or first != now)


def _is_own(function: Any, module: torch.nn.Module, key: str) -> bool:
    """Whether it is the method that the module has from its class, put back in its place."""
    is_bound = isinstance(function, MethodType) and function.__self__ is module
    return is_bound and function.__func__ is getattr(type(module), key)


def _is_users(function: Any) -> bool:
    return not (hasattr(function, "__module__") and isinstance(function.__module__, str) and is_of_library(function))
