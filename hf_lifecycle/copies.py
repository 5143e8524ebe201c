"""What is hung on a user's object is no part of it: copies, pickles and what is sent to a process are without it.

Promise: ``copy.copy``, ``copy.deepcopy`` and pickling (also by cloudpickle and multiprocessing) of an object that
:func:`stays_out` was told of give what they would have given of the object before. Not promised: the same for a
class whose own ``__reduce__`` or ``__deepcopy__`` reads ``__dict__``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Hook", "stays_out"]

_NAME = "__getstate__"  # looked up on the object itself by copy and pickle, before its class
_Strip = Callable[[dict[str, Any]], object]


def stays_out(owner: Any, strip: _Strip) -> Callable[[], None]:
    """Let ``strip`` take what is ours out of the attributes that a copy of ``owner`` is made of.

    Args:
        owner: The object that something is hung on.
        strip: Changes the attributes in place; not what they are, which the owner has too. Those told last come first.

    Returns:
        What ends that.
    """
    state = vars(owner).get(_NAME)
    if not isinstance(state, _State):
        state = _State(owner)
        vars(owner)[_NAME] = state
    return state.add(strip)


class _State:
    """The attributes of one object for its copies."""

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)  # a circle would keep a model until it is found
        self._own = vars(owner).get(_NAME)
        self._strips: dict[object, _Strip] = {}

    def __call__(self) -> Any:
        owner = self._owner()
        assert owner is not None
        of_class = getattr(type(owner), _NAME, None)  # Python 3.10 has none of its own
        of_owner = dict(vars(owner)) if of_class is None else of_class(owner)
        state = of_owner if self._own is None else self._own()
        if not isinstance(state, dict):
            return state
        state = dict(state)
        for strip in reversed(list(self._strips.values())):
            strip(state)
        if state.get(_NAME) is self:
            del state[_NAME]
        return state

    def add(self, strip: _Strip) -> Callable[[], None]:
        key = object()
        self._strips[key] = strip

        def end() -> None:
            owner = self._owner()
            self._strips.pop(key, None)
            if owner is not None and not self._strips and vars(owner).get(_NAME) is self:
                del vars(owner)[_NAME]
                if self._own is not None:
                    vars(owner)[_NAME] = self._own

        return end


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
