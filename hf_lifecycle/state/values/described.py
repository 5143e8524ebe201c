"""What a value is, in plain data that another process would give too: names for addresses, sets in order.

Promise: the same value has the same description in every process; a value of another type, name, content or bound
argument has another. Not seen: what a function's body or closure holds, and what an object hides from its ``repr``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any

import numpy as np
import torch
import xxhash

__all__ = ["described", "description", "description_digest"]

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
_DEEPEST = 12


def described(value: Any, depth: int = 0) -> Any:
    """``value`` as nested dicts with names for keys, lists, numbers, strings and None."""

    def below(one: Any) -> Any:
        return described(one, depth + 1)

    if isinstance(value, Enum):
        return below(value.value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and value != value:
        return "nan"  # which is not equal to itself
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if depth > _DEEPEST:
        return _name(type(value))
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else _text(below(key)): below(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [below(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted((below(one) for one in value), key=_text)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _of_numbers(value)
    if isinstance(value, partial):
        return {"": _name(partial), "func": below(value.func), "args": below(value.args), "kw": below(value.keywords)}
    if isinstance(getattr(value, "__qualname__", None), str):
        return _name(value)
    if is_dataclass(value):
        return {"": _name(type(value))} | {one.name: below(getattr(value, one.name, None)) for one in fields(value)}
    kind: Any = type(value)
    if kind.__repr__ is object.__repr__ and kind.__str__ is object.__str__:
        held = getattr(value, "__dict__", {})
        return {"": _name(kind)} | {name: below(one) for name, one in held.items()}
    return _ADDRESS.sub("", str(value))


def description(value: Any) -> str:
    """:func:`described` as one line."""
    return _text(described(value))


def description_digest(value: Any) -> str:
    """A digest of :func:`described`."""
    return xxhash.xxh3_128_hexdigest(description(value).encode())


def _text(description: Any) -> str:
    return description if isinstance(description, str) else json.dumps(description, sort_keys=True)


def _name(one: Any) -> str:
    return f"{getattr(one, '__module__', '')}.{one.__qualname__}"


def _of_numbers(value: torch.Tensor | np.ndarray[Any, Any]) -> list[Any]:
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        content = flat.view(torch.uint8).numpy().tobytes()
    else:
        content = repr(described(value.tolist())).encode() if value.dtype.hasobject else value.tobytes()
    return [str(value.dtype), list(value.shape), xxhash.xxh3_128_hexdigest(content)]
