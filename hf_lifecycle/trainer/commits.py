"""How a checkpoint that all ranks have written is committed, at once or when the background has written it.

On the rank that commits alone. Invariant: no exchange with other ranks in here; they were agreed with before.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.manifest import FileEntry, Manifest
from hf_lifecycle.checkpoint.older_runs import found_at_begin
from hf_lifecycle.checkpoint.store import commit
from hf_lifecycle.saving.captured import Save
from hf_lifecycle.trainer.description import describe, moment
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.neighbours import adopt_files
from hf_lifecycle.trainer.retention import Retention

__all__ = ["Commits"]

logger = logging.getLogger(__name__)


class Commits:
    """The commits of one training.

    Args:
        journal: Is told of each.
        retention: Removes old checkpoints after it.
        monitor: The metric that checkpoints are judged by; see :func:`~hf_lifecycle.trainer.description.describe`.

    Attributes:
        attempt: The call of ``train()`` that saves.
        resumed_from: The checkpoint that it resumed from; it is never removed.
    """

    def __init__(self, journal: Journal, retention: Retention, monitor: str | None) -> None:
        self.attempt = ""
        self.resumed_from: Path | None = None
        self._journal = journal
        self._retention = retention
        self._monitor = monitor
        self._older: tuple[str, ...] = ()  # what was there of other runs when this one began anew

    def begin(self, directory: Path, attempt: str, resumed_from: Path | None, *, is_main: bool) -> None:
        """Training begins, anew or from a checkpoint."""
        self.attempt, self.resumed_from = attempt, resumed_from
        self._older = found_at_begin(directory, resumed_from) if is_main else ()

    def complete(self, state: TrainerState, staged: Path) -> None:
        """Write the best checkpoint's final place, and what was hidden, into what Trainer wrote itself."""
        if state.best_global_step is not None:
            state.save_to_json(str(staged / "trainer_state.json"))

    def at_once(self, args: TrainingArguments, state: TrainerState, staged: Path, final: Path) -> None:
        """Commit what lies in ``staged``."""
        began = time.monotonic()
        committed = commit(staged, final, _listing(self._manifest(args, state), adopt_files(final, staged)))
        self._tell(committed, final, self._protected(state), time.monotonic() - began)

    def later(self, args: TrainingArguments, state: TrainerState, staged: Path, final: Path) -> Callable[[Save], int]:
        """What commits a save once it is written, and removes what is not kept; it returns the checkpoint's bytes.

        Invariant: it runs on another thread, and reads nothing that training moves.
        """
        manifest, protected = self._manifest(args, state), self._protected(state)

        def commit_it(save: Save) -> int:
            began = time.monotonic()
            committed = commit(staged, final, _listing(manifest, adopt_files(final, staged)), save.known)
            size = self._tell(committed, final, protected, time.monotonic() - began, stall_seconds=save.stall)
            logger.info("%s: saved step %d", final, save.step)
            self._retention.rotate(final, protected)
            return size

        return commit_it

    def rotate(self, state: TrainerState, final: Path) -> None:
        """Remove what is not kept, beside ``final``."""
        self._retention.rotate(final, self._protected(state))

    def _protected(self, state: TrainerState) -> list[Path]:
        """The checkpoints that are kept whatever is asked for: the best, and the one resumed from."""
        best = [] if state.best_model_checkpoint is None else [self._journal.resolved(state.best_model_checkpoint)]
        return best + ([self.resumed_from] if self.resumed_from is not None else [])

    def _manifest(self, args: TrainingArguments, state: TrainerState) -> Manifest:
        known = describe(args, state, (), attempt=self.attempt, monitor=self._monitor)
        return replace(known, older=self._older)

    def _tell(self, committed: Manifest, final: Path, protected: list[Path], seconds: float, **more: Any) -> int:
        size, tell = sum(entry.size for entry in committed.files), self._journal.write
        tell("committed", committed.step, protected=protected, seconds=seconds, bytes=size, **more, path=final)
        return size


def _listing(manifest: Manifest, adopted: frozenset[str]) -> Callable[[tuple[FileEntry, ...]], Manifest]:
    """What makes ``manifest`` one of the files that are there, but for those of others."""

    def describe(files: tuple[FileEntry, ...]) -> Manifest:
        return replace(manifest, files=tuple(file for file in files if file.path not in adopted), created=moment())

    return describe
