"""One trainer's own methods, replaced for a while: the class is not touched, and what was there before is restored.

A copy of the trainer has its own methods. Where a user has replaced ours meanwhile, that stays, and ours does no more.

Names are looked up on the trainer at hand; what it does not have is not replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Trainer

from hf_lifecycle.copies import keep_out, let_in

__all__ = ["MethodPatches", "holding", "on_exception", "overridden", "replaced"]

_ABSENT = object()


class _Method:
    """A method that is ours until :meth:`put_back`."""

    def __init__(self, owner: Any, name: str, own: Any, ours: Callable[..., Any]) -> None:
        functools.update_wrapper(self, own)
        self._owner, self._name, self._own = owner, name, own
        self._call, self._is_over = ours, False
        self._before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, self)
        keep_out(owner, self._put_back_in)

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._call(*given, **named)

    def __reduce__(self) -> Any:
        return _itself, (self._own,)  # a bound method becomes that of the copy

    def _put_back_in(self, attributes: dict[str, Any]) -> None:
        if attributes.get(self._name) is not self:
            return
        before = self._before
        while isinstance(before, _Method) and before._is_over:  # restored earlier, when this stood before it
            before = before._before
        if before is _ABSENT:
            del attributes[self._name]
        else:
            attributes[self._name] = before

    def put_back(self) -> None:
        self._call, self._is_over = self._own, True
        self._put_back_in(vars(self._owner))
        let_in(self._owner, self._put_back_in)


def _itself(one: Any) -> Any:
    return one


class MethodPatches:
    """Methods of one object that are ours until :meth:`put_back`."""

    def __init__(self) -> None:
        self._made: list[_Method] = []

    def replace(self, owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> bool:
        """Replace the method ``name`` by ``make(it)``. Returns whether there is one."""
        own = getattr(owner, name, None)
        if own is None:
            return False
        self._made.append(_Method(owner, name, own, make(own)))
        return True

    def put_back(self) -> None:
        """Undo the replacements, the last one first."""
        while self._made:
            self._made.pop().put_back()


@contextmanager
def replaced(owner: Any, **methods: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace methods by name within the block; each value makes the new one of the old one."""
    replacements = MethodPatches()
    try:
        for name, make in methods.items():
            replacements.replace(owner, name, make)
        yield
    finally:
        replacements.put_back()


@contextmanager
def holding(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let the attribute ``name`` be ``value`` within the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def on_exception(then: Callable[[], object]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """What makes of a method one that calls ``then`` before an exception leaves it."""

    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            try:
                return own(*args, **kwargs)
            except BaseException:
                then()
                raise

        return method

    return make


def overridden(trainer: Any, names: Sequence[str]) -> list[str]:
    """Which of Trainer's methods ``names`` are not its own: of a subclass, or set on the object."""
    return [
        name
        for name in names
        if getattr(type(trainer), name, None) is not getattr(Trainer, name, None) or name in vars(trainer)
    ]
