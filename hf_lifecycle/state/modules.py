"""The modules and parameters of a model by name, as ``named_modules`` and ``named_parameters`` have them.

Those yield through every level of a model; here it is gone through in one loop, since a save is stopped for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hf_lifecycle.torch_internals import children_of, own_parameters

__all__ = ["modules_of", "parameters_of", "walked_once"]


class _Walks(threading.local):
    """What was found of each model, by its ``id()``, within :func:`walked_once`."""

    modules: dict[int, list[tuple[str, torch.nn.Module]]] | None = None
    parameters: dict[int, dict[str, torch.nn.Parameter]] | None = None


_walks = _Walks()


@contextmanager
def walked_once() -> Iterator[None]:
    """Within the block, this thread goes through each model once; nobody adds a module or a parameter meanwhile."""
    before = _walks.modules, _walks.parameters
    _walks.modules, _walks.parameters = {}, {}
    try:
        yield
    finally:
        _walks.modules, _walks.parameters = before


def modules_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The model, called ``""``, and every module in it, each once, in the order of ``named_modules``."""
    known = _walks.modules
    if known is not None and id(model) in known:
        return known[id(model)]
    found: list[tuple[str, torch.nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, torch.nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        if children := children_of(module):
            before = f"{name}." if name else ""
            waiting += [(before + key, child) for key, child in reversed(children.items())]
    if known is not None:
        known[id(model)] = found  # which holds the model: no identity is used twice
    return found


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter by the first of its names, in the order of ``named_parameters``."""
    known = _walks.parameters
    if known is not None and id(model) in known:
        return known[id(model)]
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in modules_of(model):
        for key, one in own_parameters(module).items():
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                found[f"{name}.{key}" if name else key] = one
    if known is not None:
        known[id(model)] = found
    return found
