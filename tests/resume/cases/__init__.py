"""Every case of the matrix, by group."""

from __future__ import annotations

from ..harness import Case
from . import data, models, schedule, stopping, streams, training

__all__ = ["CASES", "GROUPS"]

GROUPS: dict[str, tuple[Case, ...]] = {
    "A training step": training.CASES,
    "Map-style data": data.CASES,
    "Iterable data": streams.CASES,
    "Ends of epochs, evaluation, logging, saving, and points of interruption": schedule.CASES,
    "Early stopping and the best model": stopping.CASES,
    "Other trainers and models": models.CASES,
}
CASES: tuple[Case, ...] = tuple(case for cases in GROUPS.values() for case in cases)
assert len({case.name for case in CASES}) == len(CASES), "two cases of one name"
