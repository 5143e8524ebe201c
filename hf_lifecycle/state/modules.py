"""The modules and parameters of a model by name, as ``named_modules`` and ``named_parameters`` have them.

Those yield through every level of a model; here it is gone through in one loop, since a save is stopped for it.
"""

from __future__ import annotations

import functools
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch

from hf_lifecycle.torch_internals import MODULE_PARTS, children_of, own_parameters

__all__ = [
    "MODULE_OWN",
    "PLAIN_SCALARS",
    "ModelWalks",
    "kept_of_model",
    "kept_within_look",
    "modules_of",
    "one_of_each_kind",
    "parameters_of",
]

# Attributes that modules have of torch, and that ZeRO-3 of DeepSpeed gives them.
MODULE_OWN = frozenset(vars(torch.nn.Module())) | {
    *("training", "ds_id", "ds_grads_remaining", "ds_recompute_parameters", "ds_model_granularity"),
    *("ds_model_num_layers", "ds_model_num_params", "ds_external_parameters", "ds_inflight_param_registry"),
    *("applied_pre_backward_ref_cnt", "pre_bwd_fn", "post_bwd_fn"),
}

PLAIN_SCALARS = frozenset({bool, int, float, str, bytes, type(None)})
_OF_USE = (int, float, complex, str, bytes, FunctionType, MethodType, torch.nn.Module, torch.nn.Parameter)


class _Within(threading.local):
    """The block that this thread is in."""

    walks: ModelWalks | None = None


_within = _Within()
Walk = TypeVar("Walk", bound=Callable[..., Any])


class ModelWalks:
    """What was found of models, for as long as their modules hold the very objects that they held then."""

    def __init__(self) -> None:
        self._models: dict[int, _Walked] = {}
        self._looked_at: set[int] = set()  # within the block
        self.answers: dict[Any, Any] = {}  # likewise, of :func:`kept_within_look`

    @contextmanager
    def once(self) -> Iterator[None]:
        """Within the block, this thread looks at each model once; nobody changes its modules meanwhile."""
        if _within.walks is self:
            yield
            return
        before, _within.walks = _within.walks, self
        self._looked_at, self.answers = set(), {}
        try:
            yield
        finally:
            _within.walks = before

    def found_of(self, model: torch.nn.Module) -> dict[Any, Any]:
        """What was found of a model that is as it was, by who looked; to be added to."""
        key = id(model)
        known = self._models.get(key)
        if key not in self._looked_at:
            self._looked_at.add(key)
            if known is None or not known.is_as_it_was():
                known = self._models[key] = _Walked(model)
        assert known is not None
        return known.found


class _Walked:
    """Whether a model is as it was: what its modules hold, and what the dictionaries of torch in them hold."""

    def __init__(self, model: torch.nn.Module) -> None:
        modules = _WALK(model)
        self.found: dict[Any, Any] = {(_WALK, ()): modules}
        own = [vars(module) for _, module in modules]
        parts = [one for held in own for key, one in held.items() if key in MODULE_OWN and isinstance(one, (dict, set))]
        self._is_plain = all(isinstance(held.get(key), dict) for held in own for key in MODULE_PARTS)
        self._looked_at = [*own, *parts]
        self._seen = self._look()
        # Invariant: what looks tell apart is kept, so that no identity of it is used twice. Other tensors and objects
        # may be large, and count by their types.
        self._kept = [one for one in gc.get_referents(*own) if isinstance(one, _OF_USE)]
        self._kept += [one for one in gc.get_referents(*parts) if type(one) is not torch.Tensor]
        self._plain: dict[int, Any] = {}  # likewise, of those that have changed since, by their place in a look

    def _look(self) -> tuple[list[Any], ...]:
        held = gc.get_referents(*self._looked_at)  # ten times as fast as to ask each
        return list(map(id, held)), list(map(type, held)), list(itertools.chain.from_iterable(self._looked_at))

    def is_as_it_was(self) -> bool:
        """Whether it is; where plain values changed and nothing else, what was found of these is forgotten."""
        now, before = self._look(), self._seen
        if not self._is_plain or now[1:] != before[1:]:
            return False
        if now[0] != before[0]:  # DeepSpeed counts in attributes of modules, and keeps a norm in one
            held = gc.get_referents(*self._looked_at)
            changed = [number for number, (one, was) in enumerate(zip(now[0], before[0], strict=True)) if one != was]
            if not all(type(held[number]) in PLAIN_SCALARS | {torch.Tensor} for number in changed):
                return False
            self._plain |= {number: held[number] for number in changed if type(held[number]) in PLAIN_SCALARS}
            self._seen = now
            self.found = {key: found for key, found in self.found.items() if not key[0].reads_plain_values}
        return True


def kept_of_model(look: Walk, *, reads_plain_values: bool = False) -> Walk:
    """Let ``look``, which is given a model first, find the same again within :meth:`ModelWalks.once`.

    What it finds must follow from what the modules hold, and their dictionaries of torch; from plain values among that
    only where it says so.
    """
    look.reads_plain_values = reads_plain_values  # type: ignore[attr-defined]

    @functools.wraps(look)
    def kept(model: torch.nn.Module, *given: Any) -> Any:
        if _within.walks is None:
            return look(model, *given)
        found, key = _within.walks.found_of(model), (look, given)
        if key not in found:
            found[key] = look(model, *given)
        return found[key]

    return cast("Walk", kept)


def kept_within_look(ask: Walk) -> Walk:
    """Let ``ask`` answer the same to the same question within :meth:`ModelWalks.once`."""

    @functools.wraps(ask)
    def kept(*given: Any) -> Any:
        if _within.walks is None:
            return ask(*given)
        answers, key = _within.walks.answers, (ask, given)
        if key not in answers:
            answers[key] = ask(*given)
        return answers[key]

    return cast("Walk", kept)


@kept_of_model
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


_WALK: Any = modules_of.__wrapped__  # type: ignore[attr-defined]


def one_of_each_kind(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The first module of each class in the model."""
    return list({type(module): module for _, module in reversed(modules_of(model))}.values())


@kept_of_model
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
