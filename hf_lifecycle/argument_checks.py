"""The arguments of public functions, checked where they are given.

Promise: what is returned is a plain, checked value, or a ``ValueError`` or ``TypeError`` names the argument, what it
must be, and what was given. No value is guessed from one of another kind.
"""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from os import PathLike, fspath
from typing import Any

__all__ = [
    "given",
    "read_amount",
    "read_choice",
    "read_directory",
    "read_finite",
    "read_flag",
    "read_name",
    "read_number",
    "read_path",
]


_LONG = 200


def given(value: object) -> str:
    """``value`` as an error shows it, with its type; of an array the shape, and of what is long the type alone."""
    kind, shape = type(value).__name__, getattr(value, "shape", None)
    if isinstance(shape, tuple) and math.prod(shape) != 1:
        return f"an array of shape {tuple(shape)} ({kind})"
    shown = repr(value)
    return f"{shown} ({kind})" if len(shown) <= _LONG and "\n" not in shown else f"a {kind}"


def read_number(name: str, value: object) -> float:
    """``value`` as a plain int or float; Python and NumPy scalars and one-element tensors are numbers.

    Raises:
        ValueError: It is anything else (also a bool); the message names ``name``.
    """
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "item"):
        if math.prod(shape) != 1:
            raise ValueError(f"{name} must be a single number, got an array of shape {tuple(shape)}")
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    try:
        as_float = float(value)
    except OverflowError:
        raise ValueError(f"{name} must fit into a double, got an integer that is too large") from None
    return int(value) if isinstance(value, numbers.Integral) else as_float


def read_finite(name: str, value: object, *, minimum: float = -math.inf, whole: bool = False) -> float:
    """``value`` as a finite number, where asked for not below ``minimum`` or an int."""
    number = read_number(name, value)
    if not math.isfinite(number) or number < minimum or (whole and not isinstance(number, int)):
        wanted = ("a whole number" if whole else "a finite number") + (f" >= {minimum}" if minimum > -math.inf else "")
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return number


def read_amount(name: str, value: object, *, otherwise: str = "") -> float:
    """``value`` as a whole number of things to be done, none and endless among them, in words of ``otherwise``."""
    number = read_number(name, value)
    if not number >= 0 or (math.isfinite(number) and number != int(number)):
        raise ValueError(f"{name} must be a whole number >= 0{otherwise}, got {value!r}")
    return number


def read_choice(name: str, value: object, allowed: Iterable[Any]) -> Any:
    """``value``, which must be one of the strings ``allowed``."""
    choices = tuple(allowed)
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {given(value)}")
    return value


def read_flag(name: str, value: object) -> bool:
    """``value``, which must be a bool of Python's or NumPy's."""
    if not isinstance(value, bool) and type(value).__name__ not in ("bool", "bool_"):
        raise ValueError(f"{name} must be True or False, got {given(value)}")
    return bool(value)


def read_name(name: str, value: object) -> str:
    """``value``, which must be a string, and not an empty one."""
    if not isinstance(value, str) or not value:
        raise (ValueError if isinstance(value, str) else TypeError)(f"{name} must be a name, got {given(value)}")
    return value


def read_path(name: str, value: object, *, hint: str = "") -> str:
    """``value`` as the path that it is, which is not looked for; ``hint``: what else may be given.

    Raises:
        TypeError: It is neither a string nor a path of strings.
        ValueError: No path can be so called, or it is empty.
    """
    path = fspath(value) if isinstance(value, (str, PathLike)) else None
    if not isinstance(path, str):
        raise TypeError(f"{name} must be a path{hint}, got {given(value)}")
    if not path:
        raise ValueError(f"{name} must be a path{hint}, and is empty")
    if "\0" in path:
        raise ValueError(f"{name} must not contain a null character, got {value!r}")
    return path


def read_directory(name: str, value: object) -> str:
    """``value`` as the path of a directory, which is one or can be made.

    Raises:
        NotADirectoryError: It is a file, or lies below one.
    """
    path = read_path(name, value)
    whole = os.path.abspath(os.path.expanduser(path))
    while not os.path.exists(whole):
        whole = os.path.dirname(whole)
    if not os.path.isdir(whole):
        raise NotADirectoryError(f"{name}: {whole} is a file; give the output directory of the run")
    return path
