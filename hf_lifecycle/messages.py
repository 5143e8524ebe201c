"""Many problems in few lines: a message to the user has at most ten, its first and its last among them."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike, fspath

__all__ = ["EXAMPLES", "few", "listed", "way_on"]

EXAMPLES = 3
_MOST = 7  # before the line that counts the rest


def few(names: Sequence[str], between: str = ", ") -> str:
    """The first three of ``names`` in one line, and how many more there are."""
    more = len(names) - EXAMPLES
    return between.join(names[:EXAMPLES]) + (f"{between}and {more} more" if more > 0 else "")


def listed(problems: Sequence[str], most: int = _MOST) -> str:
    """A line for each problem; of more than ``most`` and one, for the first ones, and how many more there are."""
    shown = list(problems) if len(problems) <= most + 1 else list(problems[:most])
    more = [f"and {len(problems) - len(shown)} more"] if len(shown) < len(problems) else []
    return "".join(f"\n  - {line}" for line in shown + more)


def way_on(checkpoint: str | PathLike[str]) -> str:
    """What to do about a checkpoint in which a file was edited."""
    path = fspath(checkpoint)
    return f'undo the edit, or see what differs and go on from it as it is with "hf-lifecycle accept {path}"'
