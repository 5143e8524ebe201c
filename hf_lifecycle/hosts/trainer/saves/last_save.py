"""The save in flight: how it ends, which every rank hears of, and whether training continues over that.

Promise: what went wrong with it on one rank is told at each exchange of saves until one has succeeded with it. Then all
ranks do the same about it: they raise, or continue.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerState

from hf_lifecycle.checkpoint.directory.store import PREFIX
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.errors import RankFailed, SaveFailed
from hf_lifecycle.hosts.trainer.saves.background import Background
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.processes.verdicts import in_words

__all__ = ["LastSave"]

_WHAT = "finishing the save before"  # for errors


class LastSave:
    """The save that was handed over last, while training with this state continues."""

    def __init__(self, directory: RunDirectory, background: Background, ranks: Ranks, state: TrainerState) -> None:
        self._directory = directory
        self._background = background
        self._ranks = ranks
        self._state = state
        self._place = Path()
        self._best_before: str | None = None
        self._failure: SaveFailed | None = None  # here, until every rank has heard of it

    def handed_over(self, place: Path, best_before: str | None) -> None:
        """A save is made.

        Args:
            place: Where its checkpoint will be.
            best_before: What ``state.best_model_checkpoint`` was before it.
        """
        self._place, self._best_before = place, best_before

    def told(self) -> str | None:
        """Wait for it. Returns what this rank tells the others: what went wrong with it here, if anything."""
        try:
            is_whole = self._background.settle()
        except SaveFailed as error:
            self._failure = error
        else:
            if is_whole is not None:
                self._directory.failures.ended(self._place, is_whole=is_whole)
        return None if self._failure is None else in_words(self._failure)

    def heard(self, told: Sequence[str | None]) -> SaveFailed | RankFailed | None:
        """What went wrong with it, on whichever rank, now that every rank has told; and nobody continues over that."""
        failure, self._failure = self._failure, None
        failed = {rank: words for rank, words in enumerate(told) if words is not None}
        error = failure if failure is not None or not failed else RankFailed(_WHAT, failed)
        return None if error is None or self._is_survived(error) else error

    def settle(self) -> None:
        """Wait for it, on every rank.

        Raises:
            SaveFailed: It went wrong, and training does not continue over that. On other ranks: ``RankFailed``.
        """
        with self._ranks.agree(what=_WHAT) as told:
            told.own = self.told()
        if (error := self.heard(told.each)) is not None:
            raise error

    def _is_survived(self, error: SaveFailed | RankFailed) -> bool:
        if self._directory.resolved(self._state.best_model_checkpoint or "") == self._place:
            self._state.best_model_checkpoint = self._best_before
        cause = error.cause if isinstance(error, SaveFailed) else error
        is_best = self._place.name == f"{PREFIX}{self._state.best_global_step}"
        judged = {"is_best": is_best, "is_logged": cause is not error}
        return self._directory.failures.is_survived(cause, self._place, None, self._ranks, **judged)
