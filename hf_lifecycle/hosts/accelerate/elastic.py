"""A loop whose batches and random numbers depend on the micro-batch and not on the rank that computes it.

Promise: the body of a batch begins with RNG states of the batch's number among those of all ranks, and an optimizer
step with those of the step. A prepared scheduler steps once for each optimizer step, as with one process: accelerate
lets it step once for each process, so that a schedule would depend on their number. What is still per rank is named
before training.
"""

from __future__ import annotations

import logging
from typing import Any

from torch.optim.optimizer import register_optimizer_step_pre_hook

from hf_lifecycle.data.micro_batches import MicroBatches, of_each_rank
from hf_lifecycle.hosts.accelerate.intercept import models_of, schedulers_of
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.resume.run_fingerprint import loader_facts
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Elastic"]

logger = logging.getLogger("hf_lifecycle")


class Elastic:
    """Seeds micro-batches and steps of one loop."""

    def __init__(self, accelerator: Any, ranks: Ranks, loop: Loop) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self._loop = loop
        self._handle: Any = None
        self._told: set[str] = set()
        loop.at_batch.append(self._begin_batch)

    def begin(self, loader: Any = None) -> None:
        """Training is about to begin, on ``loader``, or to be resumed."""
        for scheduler in schedulers_of(self._accelerator):
            if hasattr(scheduler, "split_batches"):
                scheduler.split_batches = True  # accelerate's name for: once for each step of an optimizer
        if loader is None:
            return
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._begin_step)
        facts, found = loader_facts(loader), [of_each_rank(model) for model in models_of(self._accelerator)]
        rows = (facts["rows"] or 0) * self._accelerator.gradient_accumulation_steps
        if rows and facts["examples"] is not None and (left := facts["examples"] % rows):
            found.append(
                f"the last step of a pass has only {left} of {rows} rows, which each number of processes completes or "
                f"drops in another way; let the data have a multiple of {rows} rows"
            )
        for problem in {one for one in found if one is not None} - self._told:
            self._told.add(problem)
            logger.warning("not exact: elastic=True: %s", problem)

    def _begin_batch(self, seed: int, epoch: int, number: int) -> None:
        MicroBatches(seed, self._ranks.rank, self._ranks.world_size).begin(epoch, number)

    def _begin_step(self, *_: Any) -> None:
        steps = self._loop.steps
        if steps.in_body() and not steps.trained:  # several optimizers may step on one batch
            MicroBatches(self._loop.seed, 0, 1).begin_step(steps.count)

    def close(self) -> None:
        """Seed no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
