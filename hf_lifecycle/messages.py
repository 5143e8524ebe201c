"""Many problems in few lines: a message to the user has at most ten, its first and its last among them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from os import PathLike, fspath

__all__ = ["EXAMPLES", "cut", "few", "few_by_owner", "listed", "shortened", "way_on"]

EXAMPLES = 3
_MOST = 7  # before the line that counts the rest


def cut(text: str, most: int = 60) -> str:
    """The text; of one that is longer than ``most`` characters, its beginning."""
    return text if len(text) <= most else text[: most - 3] + "..."


def few(names: Sequence[str], between: str = ", ") -> str:
    """The first three of ``names`` in one line, and how many more there are."""
    more = len(names) - EXAMPLES
    return between.join(names[:EXAMPLES]) + (f"{between}and {more} more" if more > 0 else "")


def few_by_owner(paths: Sequence[str]) -> str:
    """:func:`few` of paths of attributes, one for each object that they begin with; a user's own names first."""
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=lambda one: any(name.startswith("_") for name in one.split("."))):
        groups.setdefault(path.partition(".")[0], []).append(path)
    return few(
        [own[0] if len(own) == 1 else f"{own[0]} and {len(own) - 1} more of {owner}" for owner, own in groups.items()]
    )


def shortened(problems: Sequence[str], most: int = _MOST) -> list[str]:
    """The problems; of more than ``most`` and one, the first ones, and how many more there are."""
    if len(problems) <= most + 1:
        return list(problems)
    return [*problems[:most], f"and {len(problems) - most} more"]


def listed(problems: Sequence[str], most: int = _MOST) -> str:
    """A line for each of :func:`shortened`, also of one that has several."""
    return "".join(f"\n  - {_in_one_line(one)}" for one in shortened(problems, most))


def _in_one_line(text: str) -> str:
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    return "; ".join(line for line in lines if line).replace(":; ", ": ")


def way_on(checkpoint: str | PathLike[str]) -> str:
    """What to do about a checkpoint in which a file was edited."""
    path = shlex.quote(fspath(checkpoint))
    return (
        f'undo the edit, or run "hf-lifecycle accept {path}", which shows what differs and lets you resume from '
        "it as it is"
    )
