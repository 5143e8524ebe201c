"""What rank 0 answers to what the ranks have said in one exchange.

Promise: where many ranks say the same, which is usual, the answer does not grow with their number.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["heard", "in_words", "values_of", "verdict"]


def verdict(said: dict[int, dict[str, Any]], what: str) -> dict[str, Any]:
    """Rank 0's answer to what the ranks said."""
    failed = {rank: one for rank, one in said.items() if one["failed"] is not None}
    if failed:
        outermost = min(failed.values(), key=lambda one: one["stay"])
        causes = {rank: one["failed"] for rank, one in failed.items()}
        left = [rank for rank, one in failed.items() if "left" in one]
        return {"what": outermost["what"], "failed": causes, "stay": outermost["stay"], "left": left}
    elsewhere = {rank: one["what"] for rank, one in said.items() if one["what"] != what}
    if elsewhere:
        why = "; ".join(f"rank {rank} is at: {other}" for rank, other in elsewhere.items())
        return {"what": what, "missing": list(elsewhere), "why": why}
    values = [said[rank]["value"] for rank in sorted(said)]
    # Ranks that said the same have the same object (see :func:`heard`); 1 and True are equal, and are not the same.
    return {"runs": [[next(alike), 1 + sum(1 for _ in alike)] for _, alike in itertools.groupby(values, id)]}


def heard(texts: Mapping[int, str]) -> dict[int, Any]:
    """What each rank said, read once where several said the same."""
    known = {text: json.loads(text) for text in dict.fromkeys(texts.values())}
    return {rank: known[text] for rank, text in texts.items()}


def values_of(answer: Mapping[str, Any]) -> list[Any]:
    """The value of each rank, in their order, where no rank failed."""
    return [value for value, count in answer["runs"] for _ in range(count)]


def in_words(error: BaseException) -> str:
    """What the others are told of an error."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
