"""Modules, optimizers and schedulers of this process, whoever holds them: asked of Python's garbage collector.

Promise: what is attached to given models and optimizers is found by what it is attached to, which names it alike in
every process. Not seen is what ``gc.freeze()`` has put aside.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.reachable import attributes_of, is_of_library, reachable
from hf_lifecycle.torch_internals import MODULE_PARTS

__all__ = ["alive", "attached", "holders", "modules_beside", "tensors_of"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_SCHEDULER = torch.optim.lr_scheduler.LRScheduler


def alive(*kinds: type) -> list[Any]:
    """The objects of this process that are of these classes."""
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)]


def attached(
    models: Mapping[str, torch.nn.Module], optimizers: Mapping[int, str], known: Iterable[Any]
) -> tuple[dict[str, Any], list[str]]:
    """Optimizers that hold parameters of these models, and schedulers of these optimizers, which nobody named.

    Args:
        optimizers: The names of their optimizers, by the identity of each and of its wrappers.
        known: What somebody else sees to.

    Returns:
        Them by name, such as ``StepLR of optimizer 0``, and the names that several have, which are left out.
    """
    passed = {id(one) for one in known}
    parameters = {id(one): f"{name}.{key}" for name, model in models.items() for key, one in model.named_parameters()}
    found: dict[str, list[Any]] = {}
    names = dict(optimizers)
    every = alive(torch.optim.Optimizer, _SCHEDULER)
    for one in (each for each in every if issubclass(type(each), torch.optim.Optimizer)):
        groups = attributes_of(one).get("param_groups", ())
        held = [parameters[id(each)] for group in groups for each in group["params"] if id(each) in parameters]
        if held and id(one) not in passed:
            names[id(one)] = f"{type(one).__name__} of {held[0]}"
            found.setdefault(names[id(one)], []).append(one)
    schedulers = [one for one in every if issubclass(type(one), _SCHEDULER)]
    passed |= {id(inner) for one in schedulers for inner in _schedulers_within(one)}
    for one in schedulers:
        name = names.get(id(attributes_of(one).get("optimizer")))
        if name is not None and id(one) not in passed:
            found.setdefault(f"{type(one).__name__} of {name}", []).append(one)
    several = [name for name, each in found.items() if len(each) > 1]
    return {name: each[0] for name, each in found.items() if len(each) == 1}, several


def holders(known: Mapping[int, str]) -> dict[str, Any]:
    """The objects of a user's own classes that hold one of these things, ``known`` by identity, in an attribute.

    Returns:
        Each by its class and the first thing that it holds, such as ``Averaging of model 0``; where several would have
        one name, none of them.
    """
    is_users: dict[type, bool] = {}
    found: dict[str, list[Any]] = {}
    for one in gc.get_objects():
        kind = type(one)
        if kind not in is_users:
            is_users[kind] = _is_users(kind)
        if is_users[kind]:
            held = [known[id(each)] for each in list(attributes_of(one).values()) if id(each) in known]
            if held:
                found.setdefault(f"{kind.__name__} of {held[0]}", []).append(one)
    return {name: each[0] for name, each in found.items() if len(each) == 1}


def _is_users(kind: type) -> bool:
    module = getattr(kind, "__module__", None)
    if not isinstance(module, str) or issubclass(kind, (type, torch.nn.Module, torch.optim.Optimizer, _SCHEDULER)):
        return False
    return is_of_user(kind) and not is_of_library(kind)


def _schedulers_within(scheduler: Any) -> list[Any]:
    held = {key: one for key, one in attributes_of(scheduler).items() if key != "optimizer"}
    return [one for one in reachable(held).values() if isinstance(one, _SCHEDULER)]


def modules_beside(known: Iterable[Any]) -> list[torch.nn.Module]:
    """The outermost modules with tensors that have none in common with the modules among ``known``."""
    modules = [one for one in known if isinstance(one, torch.nn.Module)]
    own = {id(each) for one in modules for each in (*_modules_within(one), *tensors_of(one))}
    every = alive(torch.nn.Module)
    within = {id(child) for one in every for child in _children(one)}
    queue = [one for one in every if id(one) not in within]
    beside = []
    while queue:
        module = queue.pop()
        tensors = [] if id(module) in own else tensors_of(module)
        if any(id(one) in own for one in tensors):
            queue += _children(module)
        elif tensors:
            beside.append(module)
    return beside


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Its plain parameters and buffers, whatever its methods make of a request for them."""
    held = [attributes_of(one).get(kind) for one in _modules_within(module) for kind in MODULE_PARTS[1:]]
    return [one for each in held if isinstance(each, dict) for one in each.values() if type(one) in _PLAIN]


def _modules_within(module: torch.nn.Module) -> list[torch.nn.Module]:
    found = {id(module): module}
    queue = [module]
    while queue:
        children = [one for one in _children(queue.pop()) if id(one) not in found]
        found |= {id(one): one for one in children}
        queue += children
    return list(found.values())


def _children(module: torch.nn.Module) -> list[torch.nn.Module]:
    held = attributes_of(module).get(MODULE_PARTS[0])
    return [one for one in held.values() if one is not None] if isinstance(held, dict) else []
