"""Training arguments that are changed for a while.

Promise: what was changed is known to the arguments object itself, and is given back to it and to no other: by the part
that borrowed it, or, where training was broken off by an exception, before anything is made of the same arguments
again with any LifecycleCallback. Until then they are as training had them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainingArguments

__all__ = ["as_given", "borrow", "give_back"]

_LENT = "_hf_lifecycle_lent"  # on the arguments: the user's values by name


def _lent(args: TrainingArguments) -> dict[str, Any]:
    return dict(vars(args).get(_LENT, {}))


def _remember(args: TrainingArguments, lent: dict[str, Any]) -> None:
    if lent:
        setattr(args, _LENT, lent)
    else:
        vars(args).pop(_LENT, None)


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


@contextmanager
def as_given(args: TrainingArguments) -> Iterator[None]:
    """The arguments as the user gave them, and nothing beside them, within the block."""
    lent = _lent(args)
    ours = {name: getattr(args, name) for name in lent}
    give_back(args)
    try:
        yield
    finally:
        for name, value in ours.items():
            setattr(args, name, value)
        _remember(args, lent)
