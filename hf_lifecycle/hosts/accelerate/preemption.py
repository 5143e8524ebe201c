"""A signal, or a time limit, ends a loop, saved, at the next step boundary or at the epoch's end.

It is heeded when the body of a batch is done, on which an optimizer has stepped, and when the body of an epoch is done.
What is saved already is not saved again; a save that fails ends the loop as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from hf_lifecycle.engine.preemption import EndBySignal
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.saves.saves import Saves
from hf_lifecycle.hosts.accelerate.settings import RunSettings
from hf_lifecycle.processes.preemption import frame_of_loop

__all__ = ["Preemption"]


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
