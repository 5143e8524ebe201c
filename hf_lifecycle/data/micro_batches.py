"""The random numbers of training by micro-batch, so that it does not matter which process computes which.

Promise: the RNG states (Python, NumPy, torch, the accelerator) with which a micro-batch begins depend on the seed, the
epoch and its number among the micro-batches of all ranks alone, and those of an optimizer step on the seed and the
step. So dropout, and losses that draw, are the same on any number of processes.

Not promised: what the code between two micro-batches draws, and what is summed in another order.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_lifecycle.data.loader import LoaderTakeover
from hf_lifecycle.data.streams import seed_all

__all__ = ["MicroBatches", "of_each_process", "of_each_rank", "share_out"]


class MicroBatches:
    """Seeds the generators of this process at the begin of its micro-batches and of optimizer steps.

    Args:
        rank: The global rank of this process, which takes every ``world_size``-th micro-batch.
    """

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self._seed = seed
        self._rank = rank
        self._world_size = world_size

    def begin(self, epoch: int, number: int) -> None:
        """A micro-batch begins: number ``number`` of this process in the epoch, from 0."""
        seed_all((self._seed, "micro-batch", epoch, number * self._world_size + self._rank))

    def begin_step(self, step: int) -> None:
        """The optimizer is about to step; ``step`` steps are done. What it draws is the same on every rank."""
        seed_all((self._seed, "step", step))


def share_out(loader: LoaderTakeover, world_size: int) -> str | None:
    """Let batches be made by their number among those of all ranks. Returns why that cannot be, if it cannot."""
    sharded: Any = getattr(loader.sampler, "inner", None)
    if any(getattr(one, "split_batches", False) for one in (loader.loader, sharded)):
        return "split_batches=True: another number of processes makes other batches"
    if world_size == 1 or hasattr(loader.loader, "slice_fn"):  # one process makes them all
        loader.dataset.share(1, 0)
    elif type(sharded).__name__ == "BatchSamplerShard":
        loader.dataset.share(int(sharded.num_processes), int(sharded.process_index))
    else:
        return "every process reads the data by itself; dispatch_batches=True reads a stream once, for all of them"
    return None


def of_each_process(loader: LoaderTakeover) -> str | None:
    """What follows the batches that one process makes: objects with a state; known once ``loader`` carries them."""
    if loader.iterable or loader.objects is None or not (names := list(loader.objects.making.objects.members)):
        return None
    return (
        f"the state of {', '.join(names)} follows the batches that one process makes: with another number of processes "
        "it becomes another"
    )


def of_each_rank(model: torch.nn.Module) -> str | None:
    """What each rank has of its own micro-batches alone, whatever random numbers it gets: running statistics."""
    kinds = {
        type(module).__name__
        for module in model.modules()
        if getattr(module, "track_running_stats", False) and getattr(module, "running_mean", None) is not None
    }
    if not kinds:
        return None
    return (
        f"running statistics ({', '.join(sorted(kinds))}) are those of rank 0's micro-batches, or of a group of ranks: "
        "with another number of processes they become others"
    )
