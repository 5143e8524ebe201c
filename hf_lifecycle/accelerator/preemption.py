"""A signal ends a loop at the next step boundary, or at the epoch's end, saved: the resumed loop is the one unbroken.

It is heeded when the body of a batch is done, on which an optimizer has stepped, and when the body of an epoch is done.
What is saved already is not saved again. Several ranks end at the same step, whichever got the signal.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from typing import Any

from hf_lifecycle.accelerator.loop import Loop
from hf_lifecycle.accelerator.saves import Saves
from hf_lifecycle.accelerator.settings import RunSettings
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.preemption import SignalWatch, frame_of_loop
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.votes import Votes

__all__ = ["Preemption"]

logger = logging.getLogger("hf_lifecycle")


class Preemption:
    """Listens while a loop runs, and ends it.

    Args:
        settings: Which signals, and what comes then.
        loop: The loop.
        directory: Where it saves.
        saves: Makes the save.
    """

    def __init__(self, settings: RunSettings, loop: Loop, directory: RunDirectory, saves: Saves) -> None:
        self._settings = settings
        self._loop = loop
        self._directory = directory
        self._saves = saves
        self._ranks = Ranks.current()
        self._watch = self._new_watch()
        self._votes: Votes | None = None
        self._ended_by: signal.Signals | None = None
        loop.at_boundary.append(self._at_boundary)
        loop.at_epoch.append(self._at_epoch)

    def _new_watch(self) -> SignalWatch:
        return SignalWatch(self._settings.watched, answer=self._ranks.is_main)

    def during(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Go through ``iterator``, the outermost loop of the manager's, listening."""
        self._begin()
        try:
            yield from iterator
        finally:
            self._watch.put_back()
        self._finish()

    def _finish(self) -> None:
        """The loop came to its end, maybe because of a signal, maybe with one that came too late to be heeded."""
        number = self._ended_by or self._watch.received
        if number is not None and self._settings.on_preempt == "return":
            self._watch.tell_others(number)
        elif number is not None and self._ended_by is None:
            self._watch.deliver(number)

    def _begin(self) -> None:
        self._watch, self._ended_by, self._loop.leaving = self._new_watch(), None, False
        self._loop.progress.preempted = None
        if self._votes is None and self._settings.watched:
            self._votes = Votes("ending where a signal says so")
        self._watch.install(frame_of_loop())

    def _at_boundary(self) -> None:
        self._heed(wait=False)

    def _at_epoch(self) -> None:
        self._heed(wait=True)

    def _heed(self, *, wait: bool) -> None:
        if self._votes is None or self._ended_by is not None:
            return
        number = self._votes.cast(self._watch.received or 0, wait=wait)
        if number == 0:
            return
        received = signal.Signals(number)
        step = self._loop.progress.step
        if self._ranks.is_main:
            logger.warning("%s: saving step %d, then ending; run the same command to go on", received.name, step)
        self._directory.tell("preempted", step, why=received.name)
        if not self._saves.is_saved():
            self._save(received, step)
        self._ended_by, self._loop.leaving = received, True
        self._loop.progress.preempted = received.name
        if self._settings.on_preempt == "raise":
            self._directory.close()  # waits for the last copy to a mirror
            self._ranks.barrier(what=f"ending together after {received.name}")
            self._watch.deliver(received)

    def _save(self, received: signal.Signals, step: int) -> None:
        """Save this place. An error of it ends the loop as well, and tells what there is to go on from."""
        try:
            self._saves.save_here()
        except Exception:
            newest = next((path.name for _, path in checkpoints_in(self._directory.path)), "none")
            logger.error("%s: step %d was not saved; the newest checkpoint is %s", received.name, step, newest)
            raise
