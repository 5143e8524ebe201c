"""The modules and parameters of a model by name, as ``named_modules`` and ``named_parameters`` have them.

Those yield through every level of a model; here it is gone through in one loop, since a save is stopped for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from hf_lifecycle.torch_internals import children_of, own_parameters

__all__ = ["MODULE_OWN", "kept_within_walk", "modules_of", "one_of_each_kind", "parameters_of", "walked_once"]

# Attributes that modules have of torch, and that ZeRO-3 of DeepSpeed gives them.
MODULE_OWN = frozenset(vars(torch.nn.Module())) | {
    *("training", "ds_id", "ds_grads_remaining", "ds_recompute_parameters", "ds_model_granularity"),
    *("ds_model_num_layers", "ds_model_num_params", "ds_external_parameters", "ds_inflight_param_registry"),
    *("applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn"),
}


class _Walks(threading.local):
    """What was found of each model within :func:`walked_once`, by who looked and the model's ``id()``."""

    found: dict[Any, tuple[torch.nn.Module, Any]] | None = None


_walks = _Walks()
Walk = TypeVar("Walk", bound=Callable[..., Any])


@contextmanager
def walked_once() -> Iterator[None]:
    """Within the block, this thread goes through each model once; nobody adds a module or a parameter meanwhile."""
    before, _walks.found = _walks.found, {}
    try:
        yield
    finally:
        _walks.found = before


def kept_within_walk(look: Walk) -> Walk:
    """Let ``look``, which is given a model first, find the same again within :func:`walked_once`."""

    @functools.wraps(look)
    def kept(model: torch.nn.Module, *given: Any) -> Any:
        known = _walks.found
        if known is None:
            return look(model, *given)
        key = look, id(model), given
        if key not in known:
            known[key] = model, look(model, *given)  # held with it: no identity is used twice
        return known[key][1]

    return cast("Walk", kept)


@kept_within_walk
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
        if children := children_of(module):
            before = f"{name}." if name else ""
            waiting += [(before + key, child) for key, child in reversed(children.items())]
    return found


def one_of_each_kind(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The first module of each class in the model."""
    return list({type(module): module for _, module in reversed(modules_of(model))}.values())


@kept_within_walk
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
