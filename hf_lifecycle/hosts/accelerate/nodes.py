"""Which ranks of an accelerator share the directory of a run: all, or with ``save_on_each_node`` those of a node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.manifest import manifest_if_readable
from hf_lifecycle.errors import ResumeMismatch, UnsupportedTraining
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["nodes_of", "require_one_save", "saves_on_each_node", "writes"]

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def saves_on_each_node(accelerator: Any) -> bool:
    """Whether accelerate writes its files on each node."""
    return bool(accelerator.project_configuration.save_on_each_node)


def writes(accelerator: Any, ranks: Ranks) -> bool:
    """Whether this rank writes what is written once in a directory, and verifies it."""
    return bool(accelerator.is_local_main_process) if saves_on_each_node(accelerator) else ranks.is_main


def nodes_of(accelerator: Any, ranks: Ranks) -> Nodes:
    """The nodes, on every rank.

    Raises:
        UnsupportedTraining: Each node is to have a directory of its own, and the state is sharded over the ranks.
    """
    if not saves_on_each_node(accelerator):
        return Nodes(ranks.rank)
    nodes, kind = Nodes.of(ranks, writes=writes(accelerator, ranks)), accelerator.distributed_type.value
    if nodes.several and kind in _SHARDED:
        raise UnsupportedTraining(
            [f"save_on_each_node=True with {kind}: no node can write a complete checkpoint"],
            "use a directory on a disk that all nodes share, without save_on_each_node",
        )
    return nodes


def require_one_save(checkpoint: Path, ranks: Ranks, nodes: Nodes) -> None:
    """Where each node has its own directory, see that the ranks were given the same save.

    Raises:
        ResumeMismatch: They were given different steps, or saves of different runs; on every rank.
    """
    if not nodes.several:
        return
    manifest = manifest_if_readable(checkpoint)  # whoever verifies it says what is wrong
    attempt = "an unknown run" if manifest is None else manifest.attempt
    told = ranks.gather([checkpoint.name, attempt], what="comparing the checkpoints that the nodes resume from")
    if any(one != told[0] for one in told):
        raise ResumeMismatch(
            None,
            [f"rank {rank} resumes from {name}, saved by {by}" for rank, (name, by) in enumerate(told)],
            "leave checkpoint out of resume(): the nodes then agree on the newest that all of them have",
        )
