"""The nodes of one training, as far as checkpoints go: which ranks share a directory, and which of them writes to it.

Promise: all ranks have the same answer. Where all nodes share one directory, rank 0 writes for all; where each node has
its own (``save_on_each_node``), the first rank of each node does. Ranks are numbered node by node, as torchrun and
accelerate number them. Not asked here: whether the directories are what they are said to be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Nodes", "is_first_of_node"]

# As accelerate looks for it.
_LOCAL_RANK = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK")


@dataclass(frozen=True, slots=True)
class Nodes:
    """The nodes, as one rank sees them.

    Attributes:
        leaders: The first rank of each node that has a directory of its own; rank 0 alone where all share one.
    """

    rank: int
    leaders: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, ranks: Ranks, *, writes: bool) -> Nodes:
        """Found by one exchange; ``writes``: whether this rank writes the files of a checkpoint that all ranks have."""
        told = ranks.gather(bool(writes), what="agreeing on which ranks write checkpoints")
        writers = tuple(rank for rank, does in enumerate(told) if does)
        return cls(ranks.rank, writers if len(writers) > 1 else (0,))

    @property
    def several(self) -> bool:
        """Whether each node has a directory of its own, and there is more than one."""
        return len(self.leaders) > 1

    @property
    def leads(self) -> bool:
        """Whether this rank writes what is written once in a directory."""
        return self.rank in self.leaders

    def leader_of(self, rank: int) -> int:
        """The rank that writes to the directory of ``rank``."""
        return max((leader for leader in self.leaders if leader <= rank), default=self.leaders[0])

    @property
    def leader(self) -> int:
        return self.leader_of(self.rank)


def is_first_of_node(ranks: Ranks) -> bool:
    """Whether the launcher has made this rank the first of its node."""
    found = next((os.environ[name] for name in _LOCAL_RANK if name in os.environ), None)
    return ranks.is_main if found is None else found == "0"
