"""Early stopping among the objects of a loop: decided once, and the same on every rank.

Where there are several ranks, ``step(metric)`` takes rank 0's metric on all of them, so that all decide alike and stop
at the same step, also where their metrics differ. Every rank calls it; what the others pass is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, SupportsFloat

from hf_lifecycle.argument_checks import read_number
from hf_lifecycle.copies import keep_out
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["bind_to_ranks", "decisions"]


def decisions(objects: Iterable[Any]) -> list[EarlyStopping]:
    """The early-stopping decisions among ``objects``."""
    return [one for one in objects if isinstance(one, EarlyStopping)]


def bind_to_ranks(decision: EarlyStopping, ranks: Ranks) -> None:
    """Let ``decision.step`` take rank 0's metric and progress on every rank."""
    if ranks.world_size == 1:
        return

    def agree(metric: SupportsFloat, progress: float | None) -> tuple[float, float | None]:
        told: list[Any] | None = None
        with ranks.agree(what="early stopping"):
            if ranks.is_main:
                own_clock = decision.patience_unit == "seconds" and progress is None
                told = [float(read_number("metric", metric)), decision.elapsed_seconds if own_clock else progress]
        value, position = ranks.broadcast(told, what="the metric of early stopping")
        return value, position

    decision.shared_by = agree
    keep_out(decision, _forget_ranks)


def _forget_ranks(attributes: dict[str, Any]) -> None:
    attributes["shared_by"] = None
