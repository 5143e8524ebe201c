"""Where Trainer writes a checkpoint before it is one.

Trainer writes in place, in ``args.output_dir``. While it saves, and only then, that argument points at a hidden folder
inside; there the checkpoint is finished, flushed and given its manifest, and then renamed into place. So no torn
directory ever bears the name ``checkpoint-N``, also for scripts that look for the last checkpoint before any Trainer
exists. Retention, which Trainer would do before the save is whole, is done after it.

Left to Trainer as it is: several processes, ``push_to_hub`` (it uploads from the output directory) and hyperparameter
search (its output directories are its own).
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_lifecycle.checkpoint.events import EventLog
from hf_lifecycle.checkpoint.faults import file_at_fault
from hf_lifecycle.checkpoint.listing import infos_in
from hf_lifecycle.checkpoint.lock import DirectoryLock
from hf_lifecycle.checkpoint.manifest import FileEntry, Manifest, Metric
from hf_lifecycle.checkpoint.retention import KeepLast, RetentionPolicy, doomed
from hf_lifecycle.checkpoint.space import require_space
from hf_lifecycle.checkpoint.store import checkpoints_in, commit, hidden_folder, recover, remove, staging_folder
from hf_lifecycle.errors import DirectoryInUse, NotEnoughSpace
from hf_lifecycle.trainer.failures import SaveFailures
from hf_lifecycle.trainer.host import around_saving
from hf_lifecycle.trainer.journal import Journal
from hf_lifecycle.trainer.loans import as_given, borrow, give_back
from hf_lifecycle.trainer.origin import checkpoint_of
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.stopping import default_monitor

__all__ = ["Staging", "directory_lock", "recover_output_dir"]

logger = logging.getLogger(__name__)


def directory_lock(args: TrainingArguments) -> DirectoryLock:
    """The lock of a run's output directory, whose folder is made where it is missing."""
    assert args.output_dir is not None
    folder = hidden_folder(Path(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return DirectoryLock(folder / "lock")


class Staging(Part):
    """Lets Trainer save into the staging folder, and commits what it saved.

    Args:
        journal: Is told of what is saved and removed.
        keep: Which checkpoints are kept; None for what ``save_total_limit`` says.
        monitor: The metric that checkpoints are judged by, with or without ``eval_``; None for
            :func:`~hf_lifecycle.trainer.stopping.default_monitor`.
        failures: Says whether training goes on when a save fails.
    """

    key = "staging"

    def __init__(
        self, journal: Journal, keep: RetentionPolicy | None, monitor: str | None, failures: SaveFailures
    ) -> None:
        self._journal = journal
        self._keep = keep
        self._monitor = monitor
        self._failures = failures
        self._has_failed = False  # the save under way
        self._best_before: str | None = None  # what state.best_model_checkpoint was before it
        self._attempt = ""
        self._state: TrainerState | None = None
        self._seconds: float | None = None  # what Trainer took to write
        self._resumed_from: Path | None = None
        self._staged: Path | None = None  # what Trainer has written and is not committed yet
        self._borrowed_limit = False
        self._lock: DirectoryLock | None = None
        self._stop_redirecting: Callable[[], None] | None = None

    def prepare(self, args: TrainingArguments, state: TrainerState, attempt: str, resumed_from: Path | None) -> None:
        """Take the directory's lock, Trainer's retention, and its saving.

        Raises:
            DirectoryInUse: Another process trains into it.
            ValueError: Both ``keep`` and ``save_total_limit`` are given.
        """
        limit = args.save_total_limit
        if self._keep is not None and limit is not None:
            raise ValueError(f"keep={self._keep!r} and save_total_limit={limit!r}: give one of them, not both")
        self._attempt, self._resumed_from = attempt, resumed_from
        self._state = state
        if args.world_size > 1 or args.push_to_hub or state.is_hyper_param_search:
            if self._keep is not None:
                logger.warning("keep: checkpoints are written in place here, and none is removed")
            if self._failures.may_go_on:
                logger.warning(
                    "on_save_failure: checkpoints are written in place here; a failed save ends the training"
                )
            self._journal.begin(state.global_step, attempt, resumed_from)
            return
        self._lock = directory_lock(args)
        self._lock.acquire()
        if self._keep is None and limit is not None and limit >= 1:
            self._keep = KeepLast(limit)
        borrow(args, "save_total_limit", None)
        self._borrowed_limit = True
        self._stop_redirecting = around_saving(self._save)
        self._journal.begin(state.global_step, attempt, resumed_from)
        if self._stop_redirecting is None:
            logger.warning("this Trainer has no _save_checkpoint: checkpoints are written in place")

    def _save(self, args: TrainingArguments, save: Callable[[], object]) -> None:
        """Run ``save``, which is Trainer's own, with the output directory elsewhere."""
        assert args.output_dir is not None
        assert self._state is not None
        directory, began = Path(args.output_dir), time.monotonic()
        folder = None
        self._has_failed, self._best_before = False, self._state.best_model_checkpoint
        try:
            self._require_space(directory)
            folder = staging_folder(directory)
            self._staged = self._save_into(folder, args, save)
        except BaseException as error:
            reason = self._give_up(args, folder, error)
            if reason is error:
                raise
            if reason is not None:
                raise reason from error
            self._has_failed = True
        self._seconds = time.monotonic() - began

    def _save_into(self, folder: Path, args: TrainingArguments, save: Callable[[], object]) -> Path | None:
        directory = args.output_dir
        args.output_dir = str(folder)
        try:
            save()
        finally:
            args.output_dir = directory
        return next(iter(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")), None)

    def _require_space(self, directory: Path, unfinished: Path | None = None) -> None:
        last = next((path for _, path in checkpoints_in(directory)), self._resumed_from)
        if last is not None:
            require_space(directory, last, unfinished)

    def _give_up(self, args: TrainingArguments, unfinished: Path | None, error: BaseException) -> BaseException | None:
        """Remove what was written, put back what was before, and say it. Returns what to raise, if anything."""
        assert args.output_dir is not None
        assert self._state is not None
        self._staged = None
        file, cause = None, error
        if unfinished is not None:
            file, cause = file_at_fault(error, unfinished), self._cause(Path(args.output_dir), unfinished, error)
            shutil.rmtree(unfinished, ignore_errors=True)
        self._state.best_model_checkpoint = self._best_before
        self._journal.failed(self._state.global_step, cause)
        goes_on = self._failures.is_survived(cause, checkpoint_of(args, self._state), file, self._state)
        return None if goes_on else cause

    def _cause(self, directory: Path, unfinished: Path, error: BaseException) -> BaseException:
        """That the disk is full, where it is, which the errors of torch's writers do not say; else ``error``."""
        try:
            if isinstance(error, Exception):
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

    def finish(self, args: TrainingArguments, state: TrainerState) -> Path:
        """Commit that checkpoint, now that it is complete. Returns where it is."""
        final = checkpoint_of(args, state)
        self._journal.write("saved", state.global_step, seconds=self._seconds, path=final)
        self._seconds = None
        if self._staged is not None:
            began = time.monotonic()
            if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint) == self._staged:
                state.best_model_checkpoint = str(final)
                state.save_to_json(str(self._staged / "trainer_state.json"))
            self._save_arguments(args, self._staged)
            manifest = commit(self._staged, final, lambda files: self._describe(args, state, files))
            self._staged = None
            size = sum(entry.size for entry in manifest.files)
            seconds = time.monotonic() - began
            self._journal.write("committed", state.global_step, seconds=seconds, bytes=size, path=final)
        self._failures.succeeded()
        self._rotate(final, state)
        return final

    def _save_arguments(self, args: TrainingArguments, staged: Path) -> None:
        """Trainer saved its arguments while some of them were ours."""
        file = staged / "training_args.bin"
        if file.exists():
            with as_given(args):
                torch.save(args, file)

    def _describe(self, args: TrainingArguments, state: TrainerState, files: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(
            attempt=self._attempt,
            step=state.global_step,
            epoch=float(state.epoch),
            world_size=args.world_size,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            metric=self._metric(args, state),
            files=files,
        )

    def _metric(self, args: TrainingArguments, state: TrainerState) -> Metric | None:
        """The metric of these very weights: what was evaluated at another step says nothing of them."""
        monitor = self._monitor or default_monitor(args)
        for row in reversed(state.log_history):
            if row.get("step") != state.global_step:
                break
            for name in (monitor, f"eval_{monitor}"):
                if isinstance(row.get(name), (int, float)):
                    return Metric(name, float(row[name]))
        return None

    def _rotate(self, newest: Path, state: TrainerState) -> None:
        if not self._borrowed_limit or self._keep is None:
            return
        best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint is not None else []
        resumed = [self._resumed_from] if self._resumed_from is not None else []
        # Invariant: the one just committed stays, whatever an earlier run with more steps left in the directory.
        for info in doomed(infos_in(newest.parent), self._keep, [newest, *best, *resumed]):
            try:
                remove(info.path)
            except OSError as error:  # the checkpoint is committed all the same
                logger.warning("%s: not removed (%s)", info.path, error)
                self._journal.failed(info.step, error)
                continue
            self._journal.write("removed", info.step, path=info.path, why=f"not kept by {self._keep!r}")
            logger.info("%s removed: not kept by %r", info.path, self._keep)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._failures.repeat()

    def release(self, args: TrainingArguments) -> None:
        if self._stop_redirecting is not None:
            self._stop_redirecting()
            self._stop_redirecting = None
        if self._borrowed_limit:
            give_back(args, "save_total_limit")
            self._borrowed_limit = False
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def recover_output_dir(args: TrainingArguments) -> None:
    """Put right what a kill left in the output directory, unless another run is using it; say what was done."""
    assert args.output_dir is not None
    directory = Path(args.output_dir)
    if not args.should_save or not (hidden_folder(directory).exists() or checkpoints_in(directory)):
        return
    lock, log = directory_lock(args), EventLog(directory)
    try:
        lock.acquire()
    except DirectoryInUse:
        return  # it is not ours to mend; train() will be refused, evaluate() may go on
    try:
        for sentence in recover(directory):
            logger.warning("%s: %s", directory, sentence)
            log.write("recovered", why=sentence)
    finally:
        lock.release()
