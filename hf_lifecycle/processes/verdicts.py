"""What rank 0 answers to what the ranks have said in one exchange.

Promise: where many ranks say the same, which is usual, the answer does not grow with their number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Told", "in_words", "values_of", "verdict"]


@dataclass(slots=True)
class Told:
    """What ranks tell each other at the end of a block in which all of them have succeeded.

    Attributes:
        own: What this rank tells, to be set in the block: anything that JSON holds.
        each: What every rank has told, in their order; known after the block.
    """

    own: Any = None
    each: Sequence[Any] = ()


def verdict(said: Sequence[tuple[Sequence[int], str]], what: str) -> dict[str, Any]:
    """Rank 0's answer to what the ranks said, in their order; ``said``: a text, and the ranks that said it."""
    known = {text: json.loads(text) for _, text in said}
    heard = [(ranks, known[text]) for ranks, text in said]
    failed = {rank: one for ranks, one in heard if one["failed"] is not None for rank in ranks}
    if failed:
        outermost = min(failed.values(), key=lambda one: one["stay"])
        causes = {rank: one["failed"] for rank, one in failed.items()}
        left = [rank for rank, one in failed.items() if "left" in one]
        return {"what": outermost["what"], "failed": causes, "stay": outermost["stay"], "left": left}
    elsewhere = {rank: one["what"] for ranks, one in heard if one["what"] != what for rank in ranks}
    if elsewhere:
        why = "; ".join(f"rank {rank} is at: {other}" for rank, other in elsewhere.items())
        return {"what": what, "missing": list(elsewhere), "why": why}
    # Ranks that said the same have the same object; 1 and True are equal, and are not the same.
    alike = [list(run) for _, run in itertools.groupby(heard, lambda one: id(one[1]))]
    return {"runs": [[run[0][1]["value"], sum(len(ranks) for ranks, _ in run)] for run in alike]}


def values_of(answer: Mapping[str, Any]) -> list[Any]:
    """The value of each rank, in their order, where no rank failed."""
    return [value for value, count in answer["runs"] for _ in range(count)]


def in_words(error: BaseException) -> str:
    """What the others are told of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
