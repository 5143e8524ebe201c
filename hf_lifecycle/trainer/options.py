"""Checks of what the callback is given: a wrong argument is an error where it is written, not when training begins."""

from __future__ import annotations

from typing import Any

__all__ = ["check_choices", "check_kinds"]


def check_kinds(**arguments: tuple[Any, type | tuple[type, ...]]) -> None:
    """Raise ``TypeError`` unless each argument, given as its value and its kind, is None or of that kind."""
    for name, (value, kind) in arguments.items():
        if value is not None and not isinstance(value, kind):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            wanted = " or ".join(each.__name__ for each in kinds)
            raise TypeError(f"{name} must be a {wanted}, got {value!r} ({type(value).__qualname__})")


def check_choices(**arguments: tuple[Any, str, str]) -> None:
    """Raise ``ValueError`` unless each argument, given as its value and its two choices, is one of them."""
    for name, (value, one, other) in arguments.items():
        if value not in (one, other):
            raise ValueError(f"{name}: {one!r} or {other!r}, got {value!r}")
