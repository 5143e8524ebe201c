"""One trainer's own methods, and its arguments, replaced for a while; what was there before is restored.

The class is not touched. A copy of the trainer has its own methods. Where a user has replaced ours meanwhile, that
stays, and ours does no more. Names are looked up on the trainer at hand; what it does not have is not replaced.

What was changed of the arguments is known to the arguments object itself, and is given back to it and to no other: by
the part that borrowed it, or, where training was interrupted by an exception, before anything is made of the same
arguments again with any LifecycleCallback. Until then they are as training had them; a copy of them, and a file, has
the user's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainingArguments

from hf_lifecycle.copies import keep_out, let_in

__all__ = [
    "MethodPatches",
    "as_given",
    "borrow",
    "give_back",
    "holding",
    "is_lent",
    "on_exception",
    "overridden",
    "replaced",
]

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


_LENT = "_hf_lifecycle_lent"  # on the arguments: the user's values by name


def _lent(args: TrainingArguments) -> dict[str, Any]:
    return dict(vars(args).get(_LENT, {}))


def _remember(args: TrainingArguments, lent: dict[str, Any]) -> None:
    let_in(args, _give_back_in)
    vars(args).pop(_LENT, None)
    if lent:
        setattr(args, _LENT, lent)
        keep_out(args, _give_back_in)


def _give_back_in(attributes: dict[str, Any]) -> None:
    attributes.update(attributes.pop(_LENT, {}))


def as_given(args: TrainingArguments) -> dict[str, Any]:
    """The attributes of ``args``, those that are lent with the user's values."""
    return {**vars(args), **_lent(args)}


def is_lent(args: TrainingArguments, name: str) -> bool:
    """Whether the argument ``name`` is not the user's at present."""
    return name in _lent(args)


def borrow(args: TrainingArguments, name: str, value: Any) -> None:
    """Set an argument, and remember what the user gave."""
    _remember(args, {name: getattr(args, name), **_lent(args)})
    setattr(args, name, value)


def give_back(args: TrainingArguments, *names: str) -> None:
    """Set the arguments ``names`` to what the user gave, as far as they are lent; without names, all that are."""
    lent = _lent(args)
    for name in names or tuple(lent):
        if name in lent:
            setattr(args, name, lent.pop(name))
    _remember(args, lent)
