"""Removes old checkpoints after a commit, which Trainer would do before the new one is whole."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from transformers import TrainingArguments

from hf_lifecycle.checkpoint.retention import CheckpointInfo, KeepLast, RetentionPolicy
from hf_lifecycle.checkpoint.rotation import rotate
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.loans import borrow, give_back

__all__ = ["Retention"]


class Retention:
    """What is kept of the checkpoints of one run.

    Args:
        keep: Which; None for what ``save_total_limit`` says.
        journal: Is told of what is removed.
    """

    def __init__(self, keep: RetentionPolicy | None, journal: Journal) -> None:
        self._keep = keep
        self._journal = journal
        self._is_ours = False

    @property
    def is_given(self) -> bool:
        """Whether the user says what is kept."""
        return self._keep is not None

    def check(self, args: TrainingArguments) -> None:
        """Raise ``ValueError`` where both ``keep`` and ``save_total_limit`` are given."""
        limit = args.save_total_limit
        if self._keep is not None and limit is not None:
            raise ValueError(f"keep={self._keep!r} and save_total_limit={limit!r}: give one of them, not both")

    def take_over(self, args: TrainingArguments) -> None:
        """Take ``save_total_limit`` out of Trainer's hands."""
        limit = args.save_total_limit
        if self._keep is None and limit is not None and limit >= 1:
            self._keep = KeepLast(limit)
        borrow(args, "save_total_limit", None)
        self._is_ours = True

    def rotate(self, newest: Path, protected: Collection[Path]) -> None:
        """Remove what is not kept beside ``newest``, which has just been committed, and what is ``protected``."""
        if not self._is_ours or self._keep is None:
            return
        # Invariant: the one just committed stays, whatever an earlier run with more steps left in the directory.
        rotate(newest.parent, self._keep, [newest, *protected], self._tell)

    def _tell(self, info: CheckpointInfo) -> None:
        self._journal.write("removed", info.step, path=info.path, why=f"not kept by {self._keep!r}")

    def release(self, args: TrainingArguments) -> None:
        """Give ``save_total_limit`` back."""
        if self._is_ours:
            give_back(args, "save_total_limit")
            self._is_ours = False
