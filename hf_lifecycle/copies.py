"""What is hung on a user's object is no part of it: copies, pickles and what is sent to another process are without it.

Promise: ``copy.copy``, ``copy.deepcopy`` and pickling (that of cloudpickle, joblib and multiprocessing too) of an
object that :func:`keep_out` was told of give what they would have given had nothing been hung on it. Not promised: the
same for a class whose own ``__reduce__`` or ``__deepcopy__`` reads ``__dict__``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Hook", "keep_out", "let_in"]

_NAME = "__getstate__"  # which copy and pickle look up on the object itself, before its class
_Strip = Callable[[dict[str, Any]], object]


def keep_out(owner: Any, strip: _Strip) -> None:
    """Let ``strip`` take what is ours out of the attributes that a copy of ``owner`` is made of.

    It changes them, by name, in place; not the values, which the owner has too. Of several, those told last come first.
    """
    state = vars(owner).get(_NAME)
    if not isinstance(state, _State) or not state.is_of(owner):
        state = vars(owner)[_NAME] = _State(owner)
    if strip not in state.strips:
        state.strips.append(strip)


def let_in(owner: Any, strip: _Strip) -> None:
    """Nothing is left for ``strip`` to take out."""
    state = vars(owner).get(_NAME)
    if not isinstance(state, _State) or strip not in state.strips:
        return
    state.strips.remove(strip)
    if not state.strips:
        del vars(owner)[_NAME]


class _State:
    """The attributes of one object for its copies."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)  # a circle would keep a model until it is found
        self.strips: list[_Strip] = []

    def is_of(self, owner: Any) -> bool:
        return self._owner() is owner

    def __call__(self) -> Any:
        owner = self._owner()
        of_class = getattr(type(owner), _NAME, None)  # Python 3.10 has none of its own
        state = vars(owner) if of_class is None else of_class(owner)
        if not isinstance(state, dict):
            return state
        state = dict(state)
        for strip in reversed(self.strips):
            strip(state)
        if state.get(_NAME) is self:
            del state[_NAME]
        return state

    def __reduce__(self) -> Any:
        return _State, (self._owner(),)  # for a class that makes its copies by itself: nothing of the copy is ours


class Hook:
    """A hook in a list of a user's object. A copy of that list has one that does nothing."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._call(*given, **named)

    def __reduce__(self) -> Any:
        return Hook, (_nothing,)


def _nothing(*_: Any, **__: Any) -> None:
    """What is left of a hook in a copy."""
