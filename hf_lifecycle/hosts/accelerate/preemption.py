"""What ends a loop before its last epoch: a signal or a time limit, saved, or early stopping.

A signal is heeded when the body of a batch is done, on which an optimizer has stepped, and when the body of an epoch is
done. What is saved already is not saved again; a save that fails ends the loop as well.

Early stopping is decided once: where there are several ranks, ``step(metric)`` takes rank 0's metric on all of them, so
that all decide alike and stop at the same step, also where their metrics differ. Every rank calls it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, SupportsFloat

from hf_lifecycle.argument_checks import read_number
from hf_lifecycle.copies import keep_out
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.engine.preemption import EndBySignal
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.saves.saves import Saves
from hf_lifecycle.hosts.accelerate.settings import RunSettings
from hf_lifecycle.processes.preemption import frame_of_loop
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Preemption", "bind_to_ranks", "decisions"]


class Preemption:
    """Listens while a loop runs, and ends it."""

    def __init__(self, settings: RunSettings, loop: Loop, directory: RunDirectory, saves: Saves) -> None:
        self._raises = settings.on_preempt == "raise"
        self._loop = loop
        self._directory = directory
        self._saves = saves
        self._end = EndBySignal(settings.watched, settings.on_preempt, directory, settings.limit)
        loop.at_boundary.append(partial(self._heed, wait=False))
        loop.at_epoch.append(partial(self._heed, wait=True))

    def during(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Go through ``iterator``, the outermost loop of the manager's, listening."""
        self._loop.leaving, self._loop.progress.preempted = False, None
        self._end.listen(frame_of_loop())
        try:
            yield from iterator
        finally:
            self._end.stop_listening()
        self._end.deliver()  # also what came too late to be heeded

    def _heed(self, *, wait: bool) -> None:
        if not self._end.heed(self._loop.steps.count, wait=wait):
            return
        if not self._saves.is_saved():
            self._saves.save_here()
        self._loop.leaving, self._loop.progress.preempted = True, self._end.ended_by
        if self._raises:
            self._directory.close()  # waits for the last copy to a mirror
            self._end.deliver()


def decisions(objects: Iterable[Any]) -> list[EarlyStopping]:
    """The early-stopping decisions among ``objects``."""
    return [one for one in objects if isinstance(one, EarlyStopping)]


def bind_to_ranks(decision: EarlyStopping, ranks: Ranks) -> None:
    """Let ``decision.step`` take rank 0's metric and progress on every rank."""
    if ranks.world_size == 1:
        return

    def agree(metric: SupportsFloat, progress: float | None) -> tuple[float, float | None]:
        told: list[Any] | None = None
        with ranks.agree(what="early stopping"):
            if ranks.is_main:
                own_clock = decision.patience_unit == "seconds" and progress is None
                told = [float(read_number("metric", metric)), decision.elapsed_seconds if own_clock else progress]
        value, position = ranks.broadcast(told, what="the metric of early stopping")
        return value, position

    decision.shared_by = agree
    keep_out(decision, _forget_ranks)


def _forget_ranks(attributes: dict[str, Any]) -> None:
    attributes["shared_by"] = None
