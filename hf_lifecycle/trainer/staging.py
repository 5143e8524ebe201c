"""Where Trainer writes a checkpoint before it is one.

Trainer writes in place, in ``args.output_dir``. While it saves, and only then, that argument points at a hidden folder
inside; there the checkpoint is finished, flushed and given its manifest, and then renamed into place. So no torn
directory ever bears the name ``checkpoint-N``, also for scripts that look for the last checkpoint before any Trainer
exists. Retention, which Trainer would do before the save is whole, is done after it.

With several ranks all of them write their part into the same folder, rank 0 commits once every part is written, and a
save that failed on one has failed on all.

Left to Trainer as it is: ``push_to_hub`` (it uploads from the output directory), hyperparameter search (its output
directories are its own), ``save_on_each_node`` on several nodes, and ranks that ``torch.distributed`` does not connect.
"""

from __future__ import annotations

import logging
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
from hf_lifecycle.trainer.deferred import RankState
from hf_lifecycle.trainer.directory import directory_lock, leaves_saving_to_trainer, require_one_directory
from hf_lifecycle.trainer.failures import SaveFailures, is_of_writing
from hf_lifecycle.trainer.host import around_saving, present_trainer
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.methods import Replacements, hidden
from hf_lifecycle.trainer.neighbours import adopt_files, let_readers_come_after
from hf_lifecycle.trainer.origin import checkpoint_of
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
        self._has_failed = False  # the save under way
        self._handed_over = Path()  # the checkpoint that is being written in the background, or was the last
        self._best_before: str | None = None  # what state.best_model_checkpoint was before it
        self._state: TrainerState | None = None
        self._seconds: float | None = None  # what Trainer took to write
        self._began = 0.0  # when the save began, in seconds since the epoch
        self._staged: Path | None = None  # what Trainer has written and is not committed yet
        self._lock: DirectoryLock | None = None
        self._stop_redirecting: Callable[[], None] | None = None
        self._ours = Replacements()

    def prepare(self, args: TrainingArguments, state: TrainerState, attempt: str, resumed_from: Path | None) -> None:
        """Take the directory's lock, Trainer's retention, and its saving.

        Raises:
            DirectoryInUse: Another process trains into it. On other ranks than the first: ``RankFailed``.
            UnsupportedTraining: The ranks do not have one directory in common.
            ValueError: Both ``keep`` and ``save_total_limit`` are given.
        """
        self._retention.check(args)
        self._commits.attempt, self._commits.resumed_from = attempt, resumed_from
        self._state = state
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
            if self._ranks.is_main:
                lock = directory_lock(args)
                lock.acquire()
                self._lock = lock
        self._retention.take_over(args)
        self._stop_redirecting = around_saving(self._save)
        trainer = present_trainer() if self._stop_redirecting is not None else None
        self.background.prepare(args, trainer)
        if trainer is not None:
            self._ours.replace(trainer, "_load_best_model", self._when_settled)
            let_readers_come_after(trainer, self)
        self._journal.begin(state.global_step, attempt, resumed_from)
        if self._stop_redirecting is None:
            logger.warning("this Trainer has no _save_checkpoint: checkpoints are written in place")

    def _save(self, args: TrainingArguments, save: Callable[[], object]) -> None:
        """Run ``save``, which is Trainer's own, with the output directory elsewhere; on every rank."""
        assert args.output_dir is not None
        assert self._state is not None
        self.settle()
        directory, began = Path(args.output_dir), time.monotonic()
        folder: Path | None = None
        step = self._state.global_step
        self._has_failed, self._best_before = False, self._state.best_model_checkpoint
        try:
            with self._ranks.agree(what=f"making room for the checkpoint of step {step}"):
                if self._ranks.is_main:
                    self._require_space(directory)
                folder = staging_folder(directory)
            with self._ranks.agree(what=f"saving step {step}", tell=lambda error: self._say(directory, folder, error)):
                self._staged = self._save_into(folder, args, save)
        except BaseException as error:
            reason = self._give_up(args, folder, error)
            if reason is error:
                raise
            if reason is not None:
                raise reason from error
            self._has_failed = True
        self._seconds, self._began = time.monotonic() - began, time.time() - (time.monotonic() - began)

    def _when_settled(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """``own``, which reads checkpoints, after the last save is whole."""

        def method(*given: Any, **named: Any) -> Any:
            self.settle()
            return own(*given, **named)

        return method

    def settle(self) -> None:
        """Wait for the save in flight; on every rank.

        Raises:
            SaveFailed: It went wrong, and training does not go on over that. On other ranks than the first:
                ``RankFailed``.
        """
        if self._stop_redirecting is None:  # Trainer writes in place
            return
        assert self._state is not None
        try:
            with self._ranks.agree(what="finishing the save before"):
                is_whole = self.background.settle()
                if is_whole is not None:
                    self._failures.ended(self._handed_over, is_whole=is_whole)
        except (SaveFailed, RankFailed) as error:
            cause = error.cause if isinstance(error, SaveFailed) else error
            if self._state.best_model_checkpoint == str(self._handed_over):
                self._state.best_model_checkpoint = self._best_before
            if not is_of_writing(cause, self._ranks):
                raise
            if not self._failures.is_survived(cause, self._handed_over, None, self._state):
                raise

    def _save_into(self, folder: Path, args: TrainingArguments, save: Callable[[], object]) -> Path:
        assert self._state is not None
        directory = args.output_dir
        args.output_dir = str(folder)
        try:
            # Where there is a best step, Trainer meets in a collective amid the save, and a rank that fails before it
            # would leave the others there.
            best = hidden(self._state, "best_global_step") if self._ranks.world_size > 1 else nullcontext()
            with best, as_errors_of_ranks():
                self.background.save(self._state, save)
        finally:
            args.output_dir = directory
        staged = folder / checkpoint_of(args, self._state).name
        if self._state.best_global_step == self._state.global_step and args.save_strategy != SaveStrategy.NO:
            # As Trainer does where it is told, and where a folder is there before it looks: FSDP's shards come after.
            self._state.best_model_checkpoint = str(staged)
        return staged

    def _require_space(self, directory: Path, unfinished: Path | None = None) -> None:
        last = next((path for _, path in checkpoints_in(directory)), self._commits.resumed_from)
        if last is not None:
            require_space(directory, last, unfinished)

    def _give_up(self, args: TrainingArguments, unfinished: Path | None, error: BaseException) -> BaseException | None:
        """Remove what was written, put back what was before, and say it. Returns what to raise, if anything."""
        assert args.output_dir is not None
        assert self._state is not None
        self._staged = None
        file, cause = None, error
        if unfinished is not None:
            cause = self._cause(Path(args.output_dir), unfinished, error)
            file = file_at_fault(error, unfinished)
            if self._ranks.is_main:
                shutil.rmtree(unfinished, ignore_errors=True)
        self._state.best_model_checkpoint = self._best_before
        self._journal.failed(self._state.global_step, cause)
        if not is_of_writing(cause, self._ranks):
            return cause
        goes_on = self._failures.is_survived(cause, checkpoint_of(args, self._state), file, self._state)
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

    def discard(self, args: TrainingArguments, state: TrainerState, error: BaseException) -> BaseException | None:
        """Remove what Trainer has written and cannot be committed, since ``error`` came.

        Returns what to raise: ``error``, or that the disk is full; None where training goes on all the same.
        """
        if self._stop_redirecting is None:  # Trainer wrote in place: what is there is not ours to remove
            self._journal.failed(state.global_step, error)
            return error
        return self._give_up(args, self._staged, error)

    def folder(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """Where the checkpoint that Trainer has just saved lies; None where that save failed."""
        if self._has_failed:
            self._has_failed = False
            return None
        return checkpoint_of(args, state) if self._staged is None else self._staged

    def finish(self, args: TrainingArguments, state: TrainerState, rank: RankState | None = None) -> Path:
        """Commit that checkpoint, now that every rank has written its part. Returns where it is.

        Args:
            args: Trainer's arguments.
            state: Trainer's state.
            rank: What this rank adds, where the checkpoint is written and committed in the background.

        Raises:
            OSError: It could not be committed. On other ranks than the first: ``RankFailed``.
        """
        final = checkpoint_of(args, state)
        if rank is None:
            self._journal.write("saved", state.global_step, seconds=self._seconds, path=final)
        self._seconds, self._handed_over = None, final
        if self._staged is not None:
            if state.best_global_step == state.global_step and state.best_model_checkpoint == str(self._staged):
                state.best_model_checkpoint = str(final)
            with self._ranks.agree(what=f"committing step {state.global_step}"):
                if self._ranks.is_main and (adopted := adopt_files(final, self._staged, self._began)):
                    logger.info("%s: with files that other callbacks wrote: %s", final, ", ".join(adopted))
                if rank is not None:
                    commit = self._commits.later(args, state, self._staged, final)
                    self.background.hand_over(args, state, self._staged, final, rank, commit)
                elif self._ranks.is_main:
                    self._commits.at_once(args, state, self._staged, final)
            self._staged = None
        if rank is None:
            self._failures.ended(final, is_whole=True)
            if self._ranks.is_main:
                self._commits.rotate(state, final)
        return final

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.settle()
        self._failures.repeat()

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        self.background.release(args)  # before the lock is given back
        if self._stop_redirecting is not None:
            self._stop_redirecting()
            self._stop_redirecting = None
        self._retention.release(args)
        if self._lock is not None:
            self._lock.release()
            self._lock = None
