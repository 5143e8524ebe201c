"""Loops whose ranks have unlike numbers of batches, as torch's ``Join`` and ``accelerator.join_uneven_inputs`` allow.

Promise: ranks that have taken unlike numbers of steps save one checkpoint together where they save equally often, each
from its own place. A rank whose batches have come to their end waits in ``Join`` until those of all have, and comes to
no save: one that is made in the body of another rank's batch is an error at once, on that rank. What optimizers keep is
saved of rank 0 alone, and a warning says so.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.messages import few
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.alive import alive
from hf_lifecycle.torch_internals import joins_uneven

__all__ = ["Uneven", "agreed_step"]

logger = logging.getLogger("hf_lifecycle")

_ENDED, _SAVES = "ended", "saves"
_ADVICE = (
    "call save() as often on every rank: at the end of each epoch, after join_uneven_inputs; or let every rank have as "
    "many batches, with even_batches=True or drop_last=True"
)


class Uneven:
    """What each rank tells the others of its passes, while one of the models joins.

    Args:
        models: Gives the models that are prepared.
        optimizers: Gives the optimizers.
    """

    def __init__(
        self, ranks: Ranks, models: Callable[[], Iterable[Any]], optimizers: Callable[[], Iterable[Any]]
    ) -> None:
        self._ranks = ranks
        self._models = models
        self._optimizers = optimizers
        self._looked_at: list[int] | None = None
        self._joinable: list[weakref.ref[Any]] = []
        self._looks = False  # at the steps of all ranks, after a save
        self._has_told = False
        self._count = 0  # of passes, alike on all ranks
        self._open: list[int] = []

    @property
    def joins(self) -> bool:
        """Whether ranks may come to the end of their batches sooner than others."""
        found = (reference() for reference in self._joinable)
        return any(one is not None and joins_uneven(one) for one in found)

    def _look(self) -> None:
        """What can join, of the models that are prepared, whose wrappers accelerate does not keep."""
        models = list(map(id, self._models()))
        if self._ranks.world_size > 1 and models != self._looked_at:
            from torch.distributed.algorithms.join import Joinable  # which not every build of torch has

            self._looked_at = models
            self._joinable = [weakref.ref(one) for one in alive(Joinable)]

    def during(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Go through a pass, and tell the others of its end."""
        self._look()
        self._count += 1
        number = self._count
        self._open.append(number)
        try:
            yield from batches
        finally:
            self._open.remove(number)
            if not self._open and self.joins:
                self._looks = not self._has_told
                self._ranks.announce(_ENDED, about=f"pass {number}")

    @contextmanager
    def saving(self, steps: int) -> Iterator[None]:
        """Around a save after so many steps of this rank.

        Raises:
            UnsupportedTraining: A rank has no more batches in this pass, and will not come to the save.
        """
        if self._open and self.joins:
            self._meet(f"pass {self._open[0]}")
        yield
        if self._looks and any(getattr(one, "state", None) for one in self._optimizers()):
            self._compare(steps)

    def _meet(self, about: str) -> None:
        self._ranks.announce(_SAVES, about=about)
        words = self._ranks.announced(about=about)
        ended = [f"rank {rank} has no more batches in this pass" for rank, word in enumerate(words) if word == _ENDED]
        if ended:
            raise UnsupportedTraining([f"save() within join_uneven_inputs: {one}" for one in ended], _ADVICE)

    def _compare(self, steps: int) -> None:
        every = self._ranks.gather(steps, what="comparing the steps of the ranks")
        if len(set(every)) > 1:
            self._looks, self._has_told = False, True
            logger.warning(
                "not exact: the ranks took unlike numbers of steps (%s), so what their optimizers keep is not the "
                "same, and a checkpoint has that of rank 0 alone: a resume is refused, or not exact with strict=False; "
                "use an optimizer that keeps nothing, such as SGD without momentum, or as many batches on every rank",
                few([str(one) for one in every], ", "),
            )


def agreed_step(places: Sequence[Sequence[Any]]) -> int:
    """The step of a save to which each rank comes with (its step, the epoch a resumed run begins in, if it is over).

    Raises:
        UnsupportedTraining: The ranks save at unlike places; raised on all of them.
    """
    steps = {step for step, *_ in places}
    if len(steps) > 1 and len({tuple(place) for _, *place in places}) > 1:
        told = [
            f"rank {rank} saves at step {step}, {f'at the end of epoch {epoch - 1}' if over else f'in epoch {epoch}'}"
            for rank, (step, epoch, over) in enumerate(places)
        ]
        raise UnsupportedTraining(told, f"the ranks have unlike numbers of batches: {_ADVICE}")
    return int(max(steps))
