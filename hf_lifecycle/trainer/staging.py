"""Where Trainer writes a checkpoint before it is one.

Trainer writes in place. While its own ``_save_checkpoint`` runs, and only then, the checkpoint's folder lies in a
hidden one; when it has run, the state of this package is added, and the checkpoint is flushed, given its manifest and
renamed into place, or handed to the writer with all that it needs for that. No event is awaited: whoever called, and
the code of a subclass after ``super()._save_checkpoint()``, finds it under its name. So no torn directory ever bears
the name ``checkpoint-N``, also for scripts that look for the last checkpoint before any Trainer exists.
``args.output_dir`` is not changed. Retention, which Trainer would do before the save is complete, is done after it.

With several ranks all of them write their part into the same folder, rank 0 commits once every part is written, and a
save that failed on one has failed on all.

Left to Trainer as it is: ``push_to_hub`` (it uploads from the output directory), hyperparameter search (its output
directories are its own), ``save_on_each_node`` on several nodes, and ranks that ``torch.distributed`` does not connect.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_lifecycle.checkpoint.faults import as_errors_of_ranks, file_at_fault, in_words
from hf_lifecycle.checkpoint.lock import DirectoryLock
from hf_lifecycle.checkpoint.space import require_space
from hf_lifecycle.checkpoint.store import checkpoints_in, staging_folder
from hf_lifecycle.errors import NotEnoughSpace, RankFailed, RankUnreachable, SaveFailed
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.trainer.background import Background
from hf_lifecycle.trainer.commits import Commits
from hf_lifecycle.trainer.deferred import Content
from hf_lifecycle.trainer.directory import (
    leaves_saving_to_trainer,
    lock_directory,
    require_one_directory,
)
from hf_lifecycle.trainer.failures import SaveFailures, is_of_writing
from hf_lifecycle.trainer.host import present_trainer
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.methods import Replacements, holding, replaced
from hf_lifecycle.trainer.origin import checkpoint_of
from hf_lifecycle.trainer.own_save import around_own_save
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.retention import Retention

__all__ = ["Staging"]

logger = logging.getLogger(__name__)


class Staging(Part):
    """Lets Trainer save into the staging folder, and commits what it saved.

    Args:
        journal: Is told of what is saved.
        retention: Removes old checkpoints after a commit.
        monitor: The metric that checkpoints are judged by, with or without ``eval_``; None for
            :func:`~hf_lifecycle.trainer.stopping.default_monitor`.
        failures: Says whether training goes on when a save fails.
        background: Saves that training does not stop for.
        ranks: The processes that save together.

    Attributes:
        saved_step: The step of the last save, whether or not it failed; -1 before the first.
    """

    key = "staging"

    def __init__(
        self,
        journal: Journal,
        retention: Retention,
        monitor: str | None,
        failures: SaveFailures,
        background: Background,
        ranks: Ranks,
    ) -> None:
        self._journal = journal
        self._retention = retention
        self._commits = Commits(journal, retention, monitor)
        self._failures = failures
        self.background = background
        self._ranks = ranks
        self.saved_step = -1
        self._handed_over = Path()  # the checkpoint that is being written in the background, or was the last
        self._best_before: str | None = None  # what state.best_model_checkpoint was before it
        self._state: TrainerState | None = None
        self._content: Content | None = None
        self._has_said_so = False
        self._elsewhere: Path | None = None  # where Trainer has just saved, if not into the output directory
        self._lock: DirectoryLock | None = None
        self._stop_intercepting: Callable[[], None] | None = None
        self._ours = Replacements()

    def prepare(
        self, args: TrainingArguments, state: TrainerState, attempt: str, resumed_from: Path | None, content: Content
    ) -> None:
        """Take the directory's lock, Trainer's retention, and its saving.

        Raises:
            DirectoryInUse: Another process saves there. On other ranks than the first: ``RankFailed``.
            UnsupportedTraining: The ranks do not have one directory in common.
            ValueError: Both ``keep`` and ``save_total_limit`` are given.
        """
        self._retention.check(args)
        self._commits.begin(self._journal.directory, attempt, resumed_from, is_main=self._ranks.is_main)
        self._state, self._content = state, content
        if leaves_saving_to_trainer(args, state, self._ranks):
            if self._retention.is_given:
                logger.warning("keep: checkpoints are written in place here, and none is removed")
            if self._failures.may_go_on:
                logger.warning(
                    "on_save_failure: checkpoints are written in place here; a failed save ends the training"
                )
            self._journal.begin(state.global_step, attempt, resumed_from)
            return
        require_one_directory(args, self._ranks)
        with self._ranks.agree(what="locking the output directory"):
            if args.save_strategy != SaveStrategy.NO:  # else nothing may ever be saved, and a save takes it
                self._take_lock()
        self._retention.take_over(args)
        trainer = present_trainer()
        if hasattr(trainer, "_get_output_dir"):
            self._stop_intercepting = around_own_save(trainer, self._save)
        self.background.prepare(args, trainer if self._stop_intercepting is not None else None)
        if trainer is not None:
            self._ours.replace(trainer, "_load_best_model", self._when_settled)
        self._journal.begin(state.global_step, attempt, resumed_from)

    def _take_lock(self) -> None:
        if self._ranks.is_main and self._lock is None:
            self._lock = lock_directory(self._journal.directory)

    def _save(self, trainer: Any, save: Callable[[], object]) -> None:
        """Make a whole checkpoint of what ``save``, Trainer's own ``_save_checkpoint``, writes; on every rank."""
        args, directory = trainer.args, self._journal.directory
        assert self._state is not None
        assert self._content is not None
        step, place = self._state.global_step, trainer._get_output_dir(trial=None)
        self._elsewhere = None if self._journal.is_of(place) else Path(os.path.abspath(place))
        if self._elsewhere is not None:
            self._say_in_place(f"Trainer saves into {place}, training began with {directory}")
            save()
            return
        self.settle()
        self.saved_step, self._best_before = step, self._state.best_model_checkpoint
        staged: Path | None = None
        folder: Path | None = None
        with self._content.of_one_moment(args, self._state, trainer.control):
            try:
                with self._ranks.agree(what=f"making room for the checkpoint of step {step}"):
                    self._take_lock()
                    if self._ranks.is_main:
                        self._require_space(directory)
                    folder = staging_folder(directory)
                began = time.monotonic()
                with self._ranks.agree(
                    what=f"saving step {step}", tell=lambda error: self._say(directory, folder, error)
                ):
                    staged = self._save_into(folder, trainer, save)
                self._finish(args, self._state, staged, time.monotonic() - began)
            except BaseException as error:
                reason = self._give_up(args, folder if staged is None else staged, error)
                if reason is error:
                    raise
                if reason is not None:
                    raise reason from error

    def _say_in_place(self, why: str) -> None:
        if not self._has_said_so:
            self._has_said_so = True
            logger.warning("checkpoints are written in place, as Trainer does, and may be torn by a kill: %s", why)

    def _when_settled(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """``own``, which reads the best checkpoint, after the last save is complete, from where it was saved."""

        def method(*given: Any, **named: Any) -> Any:
            self.settle()
            assert self._state is not None
            best = self._state.best_model_checkpoint
            place = None if best is None else str(self._journal.resolved(best))
            with holding(self._state, "best_model_checkpoint", place):
                return own(*given, **named)

        return method

    def settle(self) -> None:
        """Wait for the save in flight; on every rank.

        Raises:
            SaveFailed: It went wrong, and training does not go on over that. On other ranks than the first:
                ``RankFailed``.
        """
        if self._stop_intercepting is None:  # Trainer writes in place
            return
        assert self._state is not None
        try:
            with self._ranks.agree(what="finishing the save before"):
                if (is_whole := self.background.settle()) is not None:
                    self._failures.ended(self._handed_over, is_whole=is_whole)
        except (SaveFailed, RankFailed) as error:
            cause = error.cause if isinstance(error, SaveFailed) else error
            if self._journal.resolved(self._state.best_model_checkpoint or "") == self._handed_over:
                self._state.best_model_checkpoint = self._best_before
            if not is_of_writing(cause, self._ranks):
                raise
            if not self._failures.is_survived(cause, self._handed_over, None, self._state):
                raise

    def _save_into(self, folder: Path, trainer: Any, save: Callable[[], object]) -> Path:
        assert self._state is not None
        # Where there is a best step, Trainer meets in a collective amid the save, and a rank that fails before it
        # would leave the others there.
        best = holding(self._state, "best_global_step", None) if self._ranks.world_size > 1 else nullcontext()
        with replaced(trainer, _get_output_dir=lambda _: lambda *_, **__: str(folder)), best, as_errors_of_ranks():
            self.background.save(self._state, save)
        staged = folder / checkpoint_of(trainer.args, self._state).name
        if self._state.best_global_step == self._state.global_step and trainer.args.save_strategy != SaveStrategy.NO:
            # As Trainer does where it is told, and where a folder is there before it looks: FSDP's shards come after.
            self._state.best_model_checkpoint = str(checkpoint_of(trainer.args, self._state))
        return staged

    def _require_space(self, directory: Path, unfinished: Path | None = None) -> None:
        last = next((path for _, path in checkpoints_in(directory)), self._commits.resumed_from)
        require_space(directory, last, unfinished)

    def _give_up(self, args: TrainingArguments, unfinished: Path | None, error: BaseException) -> BaseException | None:
        """Remove what was written, put back what was before, and say it. Returns what to raise, if anything."""
        assert self._state is not None
        file, cause = None, error
        if unfinished is not None:
            cause = self._cause(self._journal.directory, unfinished, error)
            file = file_at_fault(error, unfinished)
            if self._ranks.removes_after(error):
                shutil.rmtree(unfinished, ignore_errors=True)
        self._state.best_model_checkpoint = self._best_before
        self._journal.failed(self._state.global_step, cause)
        if not is_of_writing(cause, self._ranks):
            return cause
        final = self._journal.resolved(checkpoint_of(args, self._state))
        goes_on = self._failures.is_survived(cause, final, file, self._state)
        return None if goes_on else cause

    def _say(self, directory: Path, unfinished: Path | None, error: BaseException) -> str:
        """What the other ranks are told of an error here: the file, where that is known, and the cause."""
        assert unfinished is not None
        return in_words(self._cause(directory, unfinished, error), unfinished, found_in=error)

    def _cause(self, directory: Path, unfinished: Path, error: BaseException) -> BaseException:
        """That the disk is full, where it is, which the errors of torch's writers do not say; else ``error``."""
        try:
            if isinstance(error, Exception) and not isinstance(error, (RankFailed, RankUnreachable)):
                self._require_space(directory, unfinished)
        except NotEnoughSpace as lacking:
            return lacking
        return error

    def _finish(self, args: TrainingArguments, state: TrainerState, staged: Path, seconds: float) -> None:
        """Add this package's state to what Trainer wrote, and commit it, or have it written and committed."""
        assert self._content is not None
        final = self._journal.resolved(checkpoint_of(args, state))
        with self._ranks.agree(what=f"writing the state of each rank at step {state.global_step}"):
            rank = self._content.add(staged, args, state, deferred=self.background.captured)
        if rank is None:
            self._journal.write("saved", state.global_step, seconds=seconds, path=final)
        self._handed_over = final
        with self._ranks.agree(what=f"committing step {state.global_step}"):
            later = self._commits.later(args, state, staged, final)
            if rank is not None:
                self.background.hand_over(args, state, staged, final, rank, later)
            elif self._ranks.is_main:
                self._commits.complete(state, staged)
                if not self.background.prove(staged, final, later):
                    self._commits.at_once(args, state, staged, final)
        if not self.background.in_flight.exists:
            self._failures.ended(final, is_whole=True)
            if self._ranks.is_main:
                self._commits.rotate(state, final)
                logger.info("%s: saved step %d", final, state.global_step)

    def written_in_place(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint that was just saved without passing through here; None where there is none such."""
        if self.saved_step == state.global_step:
            return None
        if self._stop_intercepting is not None:
            self._say_in_place("a _save_checkpoint of its own does not call Trainer's")
        meant = Path(os.path.abspath(checkpoint_of(args, state)))  # as Trainer has just meant it
        return meant if self._elsewhere is None else self._elsewhere / meant.name

    def finish_in_place(self, final: Path, state: TrainerState) -> None:
        """Tell of a checkpoint that was written in place."""
        self.saved_step = state.global_step
        self._journal.write("saved", state.global_step, path=final)
        self._failures.ended(final, is_whole=True)
        logger.info("%s: saved step %d", final, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.settle()
        self._failures.repeat()

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        self.background.release(args)  # before the lock is given back
        if self._stop_intercepting is not None:
            self._stop_intercepting()
            self._stop_intercepting = None
        self._retention.release(args)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
