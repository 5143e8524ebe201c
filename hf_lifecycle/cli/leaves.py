"""Nested state taken apart into leaves.

Promise: neither the depth nor the number of what a file holds can exhaust this process; a file that tries is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["RefusedStateError", "leaves"]

_MOST_LEAVES = 5_000_000
_DEEPEST = 60


class RefusedStateError(ValueError):
    """What was read is no state that could be compared."""


def leaves(tree: Any) -> dict[str, Any]:
    """Every value in nested mappings and lists by its path, such as ``state.0.exp_avg``.

    Raises:
        RefusedStateError: It is nested deeper, or holds more, than any state.
    """
    found: dict[str, Any] = {}
    pending: list[tuple[str, Any, int]] = [("", tree, 0)]
    for _ in range(_MOST_LEAVES):
        if not pending:
            return found
        path, value, depth = pending.pop()
        if depth > _DEEPEST:
            raise RefusedStateError("it is nested too deeply")
        children = _children(value)
        if children is None or (path and not children):
            found[path] = value
        else:
            pending += [(f"{path}.{key}" if path else str(key), child, depth + 1) for key, child in reversed(children)]
    raise RefusedStateError("it holds more values than any state does")


def _children(value: Any) -> list[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return list(value.items())
    return list(enumerate(value)) if isinstance(value, (list, tuple)) else None
