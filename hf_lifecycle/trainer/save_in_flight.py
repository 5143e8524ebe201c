"""The save that was handed to the writer: what waits for it, and what became of it.

Promise: at most one, since the next one waits for it. An exception that leaves the training loop waits for it, and so
does a save after which somebody's code may read the checkpoint.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_lifecycle.saving.captured import Save
from hf_lifecycle.saving.direct import Blocks
from hf_lifecycle.saving.writer import Writer
from hf_lifecycle.trainer.methods import Replacements, on_exception

__all__ = ["SaveInFlight"]

logger = logging.getLogger("hf_lifecycle")


class SaveInFlight:
    """One after the other.

    Args:
        readers: Names whose code may look for a checkpoint as soon as its save has returned.

    Attributes:
        exists: Whether one was handed over, and is not settled.
        is_torn: Whether it, or the last one, was torn: its writer says so.
        waited: Seconds for which saves have waited for the one before; who tells of it sets it back.
    """

    def __init__(self, readers: Callable[[], Sequence[str]]) -> None:
        self._readers = readers
        self.exists = False
        self.is_torn = False
        self.waited = 0.0
        self._writer = Writer()
        self._ours = Replacements()
        self._has_said_so = False

    def hold_exceptions(self, trainer: Any) -> None:
        """Let an exception leave the training loop only when what is in flight is written."""
        make = on_exception(self._writer.join)
        if not self._ours.replace(trainer, "_run_epoch", make):  # transformers 5.0 has one loop for all
            self._ours.replace(trainer, "training_step", make)
            self._ours.replace(trainer.callback_handler, "call_event", make)

    def start(self, save: Save, final: Path, work: Callable[[Blocks], object]) -> None:
        """Let ``work`` run on the writer's thread.

        Args:
            save: Its record.
            final: Where the checkpoint will be.
            work: Writes and commits it.
        """
        save.stall += time.monotonic() - save.asked
        self.exists, self.is_torn = True, False  # before the thread may find it torn
        self._writer.start(work, final.name, final.parent)
        reading = self._readers()
        if reading and not self._has_said_so:
            said = "saves block until they are written, since these may read the checkpoint right after the save: %s"
            logger.warning(said, "; ".join(reading))
            self._has_said_so = True
        if reading:
            self._writer.join()

    def join(self) -> None:
        """Wait for it, and leave what went wrong to :meth:`settle`."""
        self._writer.join()

    def settle(self) -> bool | None:
        """Wait for it. Returns whether it is committed, or was torn; None if there was none.

        Raises:
            SaveFailed: It went wrong.
        """
        was_one, self.exists = self.exists, False
        self.waited += self._writer.wait()
        return not self.is_torn if was_one else None

    def release(self) -> None:
        """Training ends."""
        self._ours.put_back()
