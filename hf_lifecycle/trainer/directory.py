"""The output directory as all ranks of a run see it: one directory, held by one run, with nothing torn in it.

Promise: before training begins, every rank has the same output directory, by name and on the disk, and rank 0 holds
its lock. Recovery and locking are rank 0's; its outcome, a refusal too, is every rank's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import time
import uuid
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.durable import make_directories, sync_parents
from hf_lifecycle.checkpoint.events import EventLog
from hf_lifecycle.checkpoint.lock import DirectoryLock
from hf_lifecycle.checkpoint.store import checkpoints_in, hidden_folder, moved_aside, recover, working_folder
from hf_lifecycle.errors import DirectoryInUse, UnsupportedTraining
from hf_lifecycle.ranks import Ranks

__all__ = ["leaves_saving_to_trainer", "lock_directory", "recover_output_dir", "require_one_directory"]

logger = logging.getLogger(__name__)

_SIGHT = 10.0  # seconds that a file system may take to show a file to another machine


def lock_directory(directory: Path) -> DirectoryLock:
    """Take the lock of a run's output directory, whose folder is made where it is missing.

    Raises:
        DirectoryInUse: Another process has it.
        OSError: It cannot be written to.
    """
    folder = hidden_folder(directory)
    make_directories(folder)
    sync_parents(directory)  # Trainer made it, and does not flush
    lock = DirectoryLock(folder / "lock")
    lock.acquire()
    return lock


def recover_output_dir(args: TrainingArguments, ranks: Ranks) -> None:
    """Put right what a kill left in the output directory, unless another run is using it; say what was done.

    Rank 0 does it, and all ranks wait for it: what they find there afterwards is what it left.
    """
    with ranks.agree(what="recovering the output directory"):
        if ranks.is_main and args.should_save:
            _recover(args)


def _recover(args: TrainingArguments) -> None:
    assert args.output_dir is not None
    directory = Path(args.output_dir)
    if not (hidden_folder(directory).exists() or checkpoints_in(directory)):
        return
    try:
        lock = lock_directory(directory)
    except (DirectoryInUse, OSError):
        return  # it is not ours to mend, or cannot be: train() is refused where it saves, evaluate() may go on
    log = EventLog(directory)
    try:
        for sentence in recover(directory, progress=not args.disable_tqdm):
            logger.warning("%s: %s", directory, sentence)
            log.write("recovered", why=sentence)
        if not checkpoints_in(directory) and (aside := moved_aside(directory)):
            names = ", ".join(path.name for path in aside)
            logger.warning("%s: no checkpoint is left to resume from; damaged: %s", directory, names)
    finally:
        lock.release()


def _writes_per_node(args: TrainingArguments, ranks: Ranks) -> bool:
    """Whether each of several nodes writes checkpoints of its own (``save_on_each_node``)."""
    writers: list[bool] = ranks.gather(bool(args.should_save), what="who writes checkpoints")
    return sum(writers) > 1


def leaves_saving_to_trainer(args: TrainingArguments, state: TrainerState, ranks: Ranks) -> bool:
    """Whether checkpoints are written in place by Trainer, and nothing of them is ours but what is added."""
    if args.push_to_hub or state.is_hyper_param_search:
        return True
    if args.world_size != ranks.world_size:
        logger.warning(
            "%d processes train, but torch.distributed connects %d: checkpoints are written in place",
            args.world_size,
            ranks.world_size,
        )
        return True
    if ranks.world_size > 1 and _writes_per_node(args, ranks):
        logger.warning("save_on_each_node: every node writes checkpoints of its own, in place, as Trainer does")
        return True
    return False


def require_one_directory(args: TrainingArguments, ranks: Ranks) -> None:
    """Find out whether every rank writes to the same directory; call it on all of them.

    Raises:
        UnsupportedTraining: They have different paths, or the same path leads to different directories.
        RankFailed: A rank cannot write there; on that rank it is an ``OSError``.
    """
    if ranks.world_size == 1:
        return
    assert args.output_dir is not None
    directory = Path(os.path.abspath(args.output_dir))
    paths = ranks.gather(str(directory), what="comparing output directories")
    if len(set(paths)) > 1:
        problems = [f"rank {rank} has output_dir {path}" for rank, path in enumerate(paths)]
        raise UnsupportedTraining(problems, "give every rank the same output_dir")
    name = ranks.broadcast(f"probe-{uuid.uuid4().hex}", what="naming a probe file")
    own = None
    try:
        with ranks.agree(what=f"writing to {directory}"):
            # What a kill leaves there, the next recovery clears.
            own = working_folder(directory, "removed") / f"{name}-{ranks.rank}"
            own.write_bytes(b"")
        seen = own.with_name(f"{name}-0")
        views = ranks.gather([platform.node(), _comes_in_sight(seen)], what=f"looking for rank 0's file in {directory}")
    finally:
        if own is not None:
            with contextlib.suppress(OSError):
                own.unlink(missing_ok=True)
    blind = [f"rank {rank} on {host}" for rank, (host, sees) in enumerate(views) if not sees]
    if blind:
        raise UnsupportedTraining(
            [f"{directory} on rank 0 ({views[0][0]}) is another directory than on {', '.join(blind)}"],
            "let output_dir be on a disk that all nodes share; with save_on_each_node=True each node writes its own "
            "in place, as Trainer does",
        )


def _comes_in_sight(file: Path) -> bool:
    """Whether the file is there, or comes to be in the time that a network file system may take."""
    deadline = time.monotonic() + _SIGHT
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        os.listdir(file.parent)  # makes such a file system look again
        time.sleep(0.1)
    return True
