"""A signal ends training at a boundary that every rank reaches, and then does what it does; for every host.

Promise: all ranks end at the same boundary, whichever got the signal, and together. One that comes after the last
boundary is not lost: it does what it does when training is over. What is saved, and where a boundary is, the host says.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType

from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.processes.preemption import OnPreempt, SignalWatch
from hf_lifecycle.processes.signal_consensus import SignalConsensus

__all__ = ["EndBySignal"]

logger = logging.getLogger("hf_lifecycle")


class EndBySignal:
    """Listens for signals during one training after the other.

    Args:
        signals: Which signals; none for none.
        then: ``"raise"``: the signal does what it would have done. ``"return"``: handlers of others are called.
        directory: Is told of it.

    Attributes:
        ended_by: The signal that ends the training, from the boundary on at which it does.
    """

    def __init__(self, signals: Sequence[signal.Signals], then: OnPreempt, directory: RunDirectory) -> None:
        self.ended_by: signal.Signals | None = None
        self._signals = signals
        self._then = then
        self._directory = directory
        self._ranks = directory.ranks
        self._watch: SignalWatch | None = None
        self._votes: SignalConsensus | None = None

    def listen(self, training: FrameType | None) -> None:
        """Training begins, in this frame."""
        self.ended_by, self._watch = None, SignalWatch(self._signals, answer=self._ranks.is_main)
        if self._votes is None and self._signals:
            self._votes = SignalConsensus("ending where a signal says so")
        self._watch.install(training)

    def heed(self, step: int, *, wait: bool, then: str = "run the same command to go on") -> bool:
        """A boundary, on every rank. Returns whether training ends here, which is said once.

        Args:
            step: Optimizer steps done.
            wait: Whether the ranks wait here for each other's vote; else it is read at the next boundary.
            then: What the log advises.
        """
        if self._votes is None or self._watch is None or self.ended_by is not None:
            return False
        number = self._votes.cast(self._watch.received or 0, wait=wait)
        if number == 0:
            return False
        self.ended_by = signal.Signals(number)
        self._directory.tell("preempted", step, why=self.ended_by.name)
        if self._ranks.is_main:
            logger.warning("%s: saving step %d, then ending; %s", self.ended_by.name, step, then)
        return True

    def stop_listening(self) -> None:
        """Training is over."""
        if self._watch is not None:
            self._watch.put_back()

    def deliver(self) -> None:
        """Let the signal do what it would have done, once; called when all is on the disk, and returns if that does."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        number = self.ended_by or watch.received
        if self.ended_by is not None:
            # The first process that ends may take with it what the others still need: the store, the launcher.
            self._ranks.barrier(what=f"ending together after {self.ended_by.name}")
        if number is not None and self._then == "raise":
            watch.deliver(number)
        elif number is not None:
            watch.tell_others(number)
