"""Where Trainer writes a checkpoint before it is one.

Trainer writes in place, in ``args.output_dir``. From the moment a save is due until it is done, that argument points
at a hidden folder inside; there the checkpoint is finished, flushed and given its manifest, and then renamed into
place. So no torn directory ever bears the name ``checkpoint-N``, also for scripts that look for the last checkpoint
before any Trainer exists. Retention, which Trainer would do before the save is whole, is done after it.

Left to Trainer as it is: several processes, ``push_to_hub`` (it uploads from the output directory) and hyperparameter
search (its output directories are its own).
"""

from __future__ import annotations

import logging
import os
import shutil
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from hf_lifecycle.checkpoint.lock import DirectoryLock
from hf_lifecycle.checkpoint.manifest import FileEntry, Manifest, Metric
from hf_lifecycle.checkpoint.retention import CheckpointInfo, KeepLast, doomed
from hf_lifecycle.checkpoint.store import checkpoints_in, commit, hidden_folder, recover, remove, staging_folder
from hf_lifecycle.errors import DirectoryInUse
from hf_lifecycle.trainer.part import Part

__all__ = ["Staging", "directory_lock", "recover_output_dir"]

logger = logging.getLogger(__name__)


def directory_lock(args: TrainingArguments) -> DirectoryLock:
    """The lock of a run's output directory, whose folder is made where it is missing."""
    assert args.output_dir is not None
    folder = hidden_folder(Path(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    return DirectoryLock(folder / "lock")


class Staging(Part):
    """Points ``args.output_dir`` at the staging folder while a save is under way, and commits.

    Args:
        saves_at_evaluations: An evaluation may ask for a save.
    """

    key = "staging"

    def __init__(self, *, saves_at_evaluations: bool) -> None:
        self._saves_at_evaluations = saves_at_evaluations
        self._attempt = ""
        self._resumed_from: Path | None = None
        self._output_dir: str | None = None  # the user's, while args.output_dir points elsewhere
        self._limit: int | None = None
        self._borrowed_limit = False
        self._lock: DirectoryLock | None = None

    def prepare(self, args: TrainingArguments, state: TrainerState, attempt: str, resumed_from: Path | None) -> None:
        """Take the directory's lock and Trainer's retention.

        Raises:
            DirectoryInUse: Another process trains into it.
        """
        self._attempt, self._resumed_from = attempt, resumed_from
        if not _applies(args, state):
            return
        self._lock = directory_lock(args)
        self._lock.acquire()
        self._limit, args.save_total_limit = args.save_total_limit, None
        self._borrowed_limit = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._point_back(args)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._point_back(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self._point_at_staging(args)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._point_back(args)
        if control.should_save:
            self._point_at_staging(args)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Whether this evaluation is followed by a save is decided after this event.
        if self._saves_at_evaluations or args.save_strategy == SaveStrategy.BEST:
            self._point_at_staging(args)

    def finish(self, args: TrainingArguments, state: TrainerState, staged: Path) -> Path:
        """Commit the checkpoint that Trainer wrote and this package completed. Returns where it is."""
        if self._output_dir is None:  # a callback that comes after ours asked for this save: it is in place already
            self._rotate(staged.parent, state)
            return staged
        final = os.path.join(self._output_dir, staged.name)
        if state.best_model_checkpoint is not None and Path(state.best_model_checkpoint) == staged:
            state.best_model_checkpoint = final
            state.save_to_json(str(staged / "trainer_state.json"))
        self._save_arguments(args, staged)
        commit(staged, Path(final), lambda files: self._describe(args, state, files))
        self._point_back(args)
        self._rotate(Path(final).parent, state)
        return Path(final)

    def _save_arguments(self, args: TrainingArguments, staged: Path) -> None:
        """Trainer saved its arguments while two of them were ours."""
        file = staged / "training_args.bin"
        if file.exists():
            ours = args.output_dir, args.save_total_limit
            args.output_dir, args.save_total_limit = self._output_dir, self._limit
            try:
                torch.save(args, file)
            finally:
                args.output_dir, args.save_total_limit = ours

    def _describe(self, args: TrainingArguments, state: TrainerState, files: tuple[FileEntry, ...]) -> Manifest:
        metric = None
        if args.metric_for_best_model is not None and state.best_metric is not None:
            metric = Metric(args.metric_for_best_model, float(state.best_metric))
        return Manifest(
            attempt=self._attempt,
            step=state.global_step,
            epoch=float(state.epoch),
            world_size=args.world_size,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            metric=metric,
            files=files,
        )

    def _rotate(self, directory: Path, state: TrainerState) -> None:
        if not self._borrowed_limit or self._limit is None or self._limit < 1:
            return
        infos = [CheckpointInfo(step, path) for step, path in checkpoints_in(directory)]
        best = [Path(state.best_model_checkpoint)] if state.best_model_checkpoint is not None else []
        resumed = [self._resumed_from] if self._resumed_from is not None else []
        for info in doomed(infos, KeepLast(self._limit), [*best, *resumed]):
            remove(info.path)
            logger.info("%s removed: save_total_limit is %d", info.path, self._limit)

    def _point_at_staging(self, args: TrainingArguments) -> None:
        if self._borrowed_limit and self._output_dir is None:
            assert args.output_dir is not None
            folder = staging_folder(Path(args.output_dir))
            self._output_dir, args.output_dir = args.output_dir, str(folder)

    def _point_back(self, args: TrainingArguments) -> None:
        if self._output_dir is None:
            return
        assert args.output_dir is not None
        staging, args.output_dir, self._output_dir = Path(args.output_dir), self._output_dir, None
        for entry in staging.iterdir():  # what other callbacks wrote to the output directory in the meantime
            _hand_over(entry, Path(args.output_dir) / entry.name)

    def release(self, args: TrainingArguments) -> None:
        if self._output_dir is not None and args.output_dir is not None:
            for unfinished in Path(args.output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
                shutil.rmtree(unfinished, ignore_errors=True)
        self._point_back(args)
        if self._borrowed_limit:
            args.save_total_limit, self._borrowed_limit = self._limit, False
        if self._lock is not None:
            self._lock.release()
            self._lock = None


def _applies(args: TrainingArguments, state: TrainerState) -> bool:
    return args.world_size == 1 and not args.push_to_hub and not state.is_hyper_param_search


def _hand_over(entry: Path, target: Path) -> None:
    if entry.is_dir() and target.is_dir():
        shutil.copytree(entry, target, dirs_exist_ok=True)
        shutil.rmtree(entry)
    else:
        os.replace(entry, target)


def recover_output_dir(args: TrainingArguments) -> None:
    """Put right what a kill left in the output directory, unless another run is using it; say what was done."""
    assert args.output_dir is not None
    directory = Path(args.output_dir)
    if not args.should_save or not (hidden_folder(directory).exists() or checkpoints_in(directory)):
        return
    lock = directory_lock(args)
    try:
        lock.acquire()
    except DirectoryInUse:
        return  # it is not ours to mend; train() will be refused, evaluate() may go on
    try:
        for sentence in recover(directory):
            logger.warning("%s: %s", directory, sentence)
    finally:
        lock.release()
