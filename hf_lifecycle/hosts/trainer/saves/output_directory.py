"""The output directory before Trainer loads from it, and whether what is saved there is Trainer's own.

Promise: recovery is rank 0's; its outcome, a refusal too, is every rank's.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, hidden_folder, moved_aside, recover
from hf_lifecycle.engine.directory_access import lock_directory
from hf_lifecycle.errors import DirectoryInUse
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["leaves_saving_to_trainer", "recover_output_dir"]

logger = logging.getLogger(__name__)


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
        return  # it is not ours to mend, or cannot be: train() is refused where it saves, evaluate() may continue
    log = EventLog(directory)
    try:
        for sentence in recover(directory, progress=not args.disable_tqdm):
            logger.warning("%s: %s", directory, sentence)
            log.write("recovered", why=sentence)
        if not checkpoints_in(directory) and (aside := moved_aside(directory)):
            names = ", ".join(path.name for path in aside)
            logger.warning("%s: no intact checkpoint is left to resume from; damaged: %s", directory, names)
    finally:
        lock.release()


def _writes_per_node(args: TrainingArguments, ranks: Ranks) -> bool:
    """Whether each of several nodes writes checkpoints of its own (``save_on_each_node``)."""
    writers: list[bool] = ranks.gather(bool(args.should_save), what="agreeing on which ranks write checkpoints")
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
        logger.warning("save_on_each_node: every node writes its own checkpoints, in place, as Trainer does")
        return True
    return False
