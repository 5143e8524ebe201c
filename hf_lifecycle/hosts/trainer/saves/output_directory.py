"""The output directory before Trainer loads from it, and whether what is saved there is Trainer's own.

Promise: recovery is rank 0's, or that of the first rank of each node; its outcome, a refusal too, is every rank's.
"""

from __future__ import annotations

import logging
from pathlib import Path

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, hidden_folder, moved_aside, recover
from hf_lifecycle.engine.directory_access import lock_directory
from hf_lifecycle.errors import DirectoryInUse
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.messages import few, listed
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["leaves_saving_to_trainer", "recover_output_dir"]

logger = logging.getLogger(__name__)


def recover_output_dir(args: TrainingArguments, ranks: Ranks) -> None:
    """Put right what a kill left in the output directory, unless another run uses it; say what was done.

    Rank 0, or the first rank of each node, does it, and all ranks wait for it: what they find then is what it left.
    """
    with ranks.agree(what="recovering the output directory"):
        if args.should_save and (ranks.is_main or args.save_on_each_node):
            _recover(args)
    if args.save_on_each_node and ranks.world_size > 1:
        _report_differences(args, ranks)


def _report_differences(args: TrainingArguments, ranks: Ranks) -> None:
    """Say where nodes have different checkpoints, since ``resume_from_checkpoint=True`` takes each node's newest."""
    found = checkpoints_in(Path(str(args.output_dir)))
    names = [path.name for _, path in found] if args.should_save else None
    told = ranks.gather(names, what="comparing the checkpoints of the nodes")
    each = {rank: names for rank, names in enumerate(told) if names is not None}
    if ranks.is_main and any(names != each[0] for names in each.values()):
        logger.warning(
            "the nodes have different checkpoints:%s\nto resume, pass resume_from_checkpoint="
            "latest_checkpoint(args.output_dir, save_on_each_node=True) to train()",
            listed([f"rank {rank}: {few(names) or 'none'}" for rank, names in each.items()]),
        )


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


def leaves_saving_to_trainer(args: TrainingArguments, state: TrainerState, ranks: Ranks, nodes: Nodes) -> bool:
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
    trainer = present_trainer()
    if nodes.several and any(getattr(trainer, f"is_{name}_enabled", False) for name in ("fsdp", "deepspeed")):
        logger.warning(
            "save_on_each_node: the state is sharded over the ranks, so no node has a complete checkpoint; every node "
            "writes its own part in place, as Trainer does"
        )
        return True
    return False
