"""The modules and parameters of a model by name, as ``named_modules`` and ``named_parameters`` have them.

Those yield through every level of a model; here it is gone through in one loop, since a save is stopped for it.
"""

from __future__ import annotations

import torch

from hf_lifecycle.torch_internals import children_of, own_parameters

__all__ = ["modules_of", "parameters_of"]


def modules_of(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The model, called ``""``, and every module in it, each once, in the order of ``named_modules``."""
    found: list[tuple[str, torch.nn.Module]] = []
    seen: set[int] = set()
    waiting: list[tuple[str, torch.nn.Module | None]] = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if module is None or id(module) in seen:
            continue
        seen.add(id(module))
        found.append((name, module))
        if children_of(module):
            before = f"{name}." if name else ""
            waiting += [(before + key, child) for key, child in reversed(children_of(module).items())]
    return found


def parameters_of(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter by the first of its names, in the order of ``named_parameters``."""
    found: dict[str, torch.nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in modules_of(model):
        for key, one in own_parameters(module).items():
            if one is not None and id(one) not in seen:
                seen.add(id(one))
                found[f"{name}.{key}" if name else key] = one
    return found
