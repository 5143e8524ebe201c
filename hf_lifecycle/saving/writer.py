"""One save in flight: its files are written by a thread while training continues.

Promise: at most one save is under way; the next one waits for it. What goes wrong is kept and raised by the next
:meth:`Writer.start` or :meth:`Writer.wait`, once, with the checkpoint and the cause; also that there was no thread to
be had. The thread is no daemon: an interpreter that ends waits for it. It starts no thread, calls no accelerator and no
collective, and draws nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from hf_lifecycle.checkpoint.directory.lock import announce
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.files.write_errors import cause_in_words
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.task import Task

__all__ = ["Writer"]

logger = logging.getLogger(__name__)


class Writer:
    """Runs one piece of work after the other, each in a thread of its own."""

    def __init__(self) -> None:
        self._task: Task | None = None
        self._unstarted: BaseException | None = None  # why there was no thread
        self._what = ""

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._task is not None and self._task.is_alive()

    def start(self, work: Callable[[Blocks], object], what: str, directory: Path) -> BaseException | None:
        """Let ``work`` write with the blocks it is given, when the save before is done, from :meth:`begin` on.

        Args:
            what: The checkpoint, for the message of a failure.
            directory: What it will lie in. Who looks for checkpoints there waits for it.

        Returns:
            Why there is no thread for it; :meth:`wait` raises that, too.

        Raises:
            SaveFailed: The save before went wrong. This one was not started.
        """
        self.wait()
        self._what, done = what, announce(directory)

        def say(error: BaseException) -> None:
            newest = next((path.name for _, path in checkpoints_in(directory)), "none")
            cause = f"{type(error).__name__}: {error}{cause_in_words(error)}"
            logger.error("%s: not saved: %s; the newest checkpoint is %s", directory / what, cause, newest)

        try:
            self._task = _task(work, say, done)
        except BaseException as error:
            done()
            if not isinstance(error, (MemoryError, RuntimeError)):
                raise
            say(error)
            self._unstarted = error
        return self._unstarted

    def begin(self) -> None:
        """Let the work begin: who started it has no more Python to run for a while. A second later it begins anyway."""
        if self._task is not None:
            self._task.begin()

    def _others_waiting(self) -> AbstractContextManager[None]:
        """Around a wait: other ranks may come to an exchange meanwhile, and however long it takes, this one lives."""
        return Ranks.current().working(f"writing {self._what}") if self.busy else nullcontext()

    def join(self) -> None:
        """Wait for what is in flight, and leave what went wrong to :meth:`wait`."""
        if self._task is not None:
            with self._others_waiting():
                self._task.join()

    def wait(self) -> float:
        """Wait for what is in flight. Returns the seconds that it took.

        Raises:
            SaveFailed: It went wrong.
        """
        began = time.perf_counter()
        with self._others_waiting():
            failure = self._unstarted if self._task is None else self._task.failure()
        self._task = self._unstarted = None
        if failure is not None:
            raise SaveFailed(self._what, failure) from failure
        return time.perf_counter() - began


def _task(work: Callable[[Blocks], object], say: Callable[[BaseException], object], done: Callable[[], object]) -> Task:
    """A thread for the work, which is held. Raises what there is no other thread for."""
    blocks = Blocks()

    def run() -> None:
        try:
            work(blocks)
        except BaseException as error:
            say(error)
            raise
        finally:
            blocks.close()
            done()

    try:
        return Task(run, "hf_lifecycle-save", held=True)
    except BaseException:  # the thread of the blocks would wait for ever
        blocks.close()
        raise
