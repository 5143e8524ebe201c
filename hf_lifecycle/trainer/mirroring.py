"""When checkpoints go to the mirror, under Trainer: each as soon as it is committed; the end waits for the last.

At a resume the checkpoint that is resumed from is copied too, where the run before had no time for it. A training that
breaks off with an exception leaves the copy under way to go on, until the next training or the end of the process.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.manifest import manifest_path
from hf_lifecycle.checkpoint.retention import KeepLast, RetentionPolicy
from hf_lifecycle.mirror.courier import Courier
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.part import Part

__all__ = ["Mirroring"]

logger = logging.getLogger(__name__)


class Mirroring(Part):
    """Hears what the journal is told, and hands what was committed to a courier; on the main process alone.

    Args:
        mirror: The second place.
        journal: Tells when a checkpoint is committed, and is told what became of its copy.
        keep: What is kept there, where the mirror does not say so itself.
    """

    key = "mirroring"

    def __init__(self, mirror: Mirror, journal: Journal, keep: RetentionPolicy | None) -> None:
        self._mirror = mirror
        self._journal = journal
        self._keep = keep
        self._resumed_from: Path | None = None
        self._courier: Courier | None = None
        self._heard: set[str] = set()
        journal.listen(self._hear)

    @classmethod
    def of(
        cls, mirror: Mirror | None, journal: Journal, keep: RetentionPolicy | None, limit: int | None
    ) -> tuple[Mirroring, ...]:
        """The part, if there is a mirror; it keeps what the output directory does, by ``keep`` or else ``limit``."""
        if mirror is None:
            return ()
        return (cls(mirror, journal, keep or (KeepLast(limit) if limit is not None and limit >= 1 else None)),)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.process_index != 0:
            return
        self._courier = Courier(self._mirror, self._journal.directory, self._journal.write, keep=self._keep)
        resumed = self._resumed_from
        if (
            resumed is not None
            and resumed.parent.resolve() == self._journal.directory.resolve()
            and manifest_path(resumed).is_file()
        ):
            self._courier.offer(resumed, [resumed, *self._best(state)])

    def _hear(self, event: str, step: int, facts: Mapping[str, Any]) -> None:
        self._heard.add(event)
        if event == "resumed":
            self._resumed_from = facts["path"]
        elif event == "committed" and self._courier is not None:
            self._courier.offer(facts["path"], facts["protected"])

    def _best(self, state: TrainerState) -> list[Path]:
        best = state.best_model_checkpoint
        return [] if best is None else [self._journal.resolved(best)]

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._courier is not None:
            self._courier.close()
            if "saved" in self._heard and "committed" not in self._heard:
                logger.warning(
                    "mirror: checkpoints were written in place, so none was copied to %s", self._mirror.shown
                )

    def release(self, args: TrainingArguments) -> None:
        if self._courier is not None:
            self._courier.close(0)  # of a training that broke off; after one that ended there is nothing left
            self._courier = None
