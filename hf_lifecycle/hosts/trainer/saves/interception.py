"""Trainer's own ``_save_checkpoint``, intercepted for the trainers that ask for it, whoever calls it.

A subclass that has a ``_save_checkpoint`` of its own reaches Trainer's by ``super()``, which no attribute of an object
can intercept. So the method of the class is replaced, once, by one that does for all others what it did. Trainers are
known by weak reference: a copy of one is another trainer, and none is kept alive.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import weakref
from collections.abc import Callable
from typing import Any

from transformers import Trainer

from hf_lifecycle.hosts.trainer.intercept import SAVE

__all__ = ["around_own_save", "overrides_that_run_on"]

_Wrapper = Callable[[Any, Callable[[], object]], None]
# By the identity of each trainer, which may have no hash, with a reference to it.
# Invariant: no strong reference to what leads to the trainer, which would keep it for ever.
_around: dict[int, tuple[weakref.ref[Any], weakref.WeakMethod[_Wrapper]]] = {}


def around_own_save(trainer: Any, wrapper: _Wrapper) -> Callable[[], None] | None:
    """Let ``wrapper(trainer, save)`` run instead of Trainer's own ``_save_checkpoint``, with ``save`` doing it.

    ``wrapper`` is a method, whose object the caller keeps.

    Returns what ends that; None where there is no such method.
    """
    if trainer is None or not hasattr(Trainer, SAVE):
        return None
    _install()
    key = id(trainer)
    mine = weakref.ref(trainer, lambda _: _around.pop(key, None)), weakref.WeakMethod(wrapper)
    _around[key] = mine

    def stop() -> None:
        if _around.get(key) is mine:
            del _around[key]

    return stop


def _install() -> None:
    own = getattr(Trainer, SAVE)
    if getattr(own, "of_hf_lifecycle", False):
        return

    @functools.wraps(own)
    def method(self: Any, *given: Any, **named: Any) -> Any:
        known, wrapping = _around.get(id(self), (None, None))
        wrapper = wrapping() if known is not None and wrapping is not None and known() is self else None
        if wrapper is None:
            return own(self, *given, **named)
        return wrapper(self, functools.partial(own, self, *given, **named))

    method.of_hf_lifecycle = True  # type: ignore[attr-defined]
    setattr(Trainer, SAVE, method)


def overrides_that_run_on(trainer: Any) -> list[str]:
    """The classes whose ``_save_checkpoint`` may look at the checkpoint when Trainer's own has returned."""
    found = [kind for kind in type(trainer).__mro__ if kind is not Trainer and SAVE in vars(kind)]
    names = [kind.__name__ for kind in found if not _ends_with_super(vars(kind)[SAVE])]
    return names + (["an attribute of the trainer"] if SAVE in vars(trainer) else [])


def _ends_with_super(method: Any) -> bool:
    """Whether ``super()._save_checkpoint(...)`` is the last that a method does, as its source says."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return False
    function = tree.body[0] if tree.body else None
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return False
    last = function.body[-1]
    value = last.value if isinstance(last, (ast.Expr, ast.Return)) else None
    return _is_super_call(value) and sum(_is_super_call(node) for node in ast.walk(function)) == 1


def _is_super_call(node: Any) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == SAVE):
        return False
    owner = node.func.value
    return isinstance(owner, ast.Call) and isinstance(owner.func, ast.Name) and owner.func.id == "super"
