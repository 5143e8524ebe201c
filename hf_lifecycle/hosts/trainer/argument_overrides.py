"""Training arguments that are changed for a while.

Promise: what was changed is known to the arguments object itself, and is given back to it and to no other: by the part
that borrowed it, or, where training was interrupted by an exception, before anything is made of the same arguments
again with any LifecycleCallback. Until then they are as training had them; a copy of them, and a file, has the user's.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from hf_lifecycle.copies import keep_out, let_in

__all__ = ["as_given", "borrow", "give_back", "is_lent"]

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
