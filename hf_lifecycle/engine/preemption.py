"""A signal, or a time limit, ends training at a boundary that every rank reaches; for every host.

Promise: all ranks end at the same boundary, whichever got the signal, and together. One that comes after the last
boundary is not lost: it does what it does when training is over. What is saved, and where a boundary is, the host says.
A time limit is one more source of the same request; what it raises is SIGTERM, which a scheduler would have sent.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from types import FrameType

from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.processes.deadline import Deadline, TimeLimit
from hf_lifecycle.processes.preemption import OnPreempt, SignalWatch
from hf_lifecycle.processes.rank_watch import RankWatch
from hf_lifecycle.processes.signal_consensus import SignalConsensus

__all__ = ["EndBySignal"]

logger = logging.getLogger("hf_lifecycle")

TIME_LIMIT = "time limit"
_DUE = 1  # what a rank names whose time is up. A signal, which is its number and 1, says more, and wins


class EndBySignal:
    """Listens for signals during one training after the other.

    Args:
        then: ``"raise"``: the signal does what it would have done. ``"return"``: handlers of others are called.

    Attributes:
        ended_by: The name of the signal that ends the training, or ``"time limit"``, from the boundary on at which it
            does.
    """

    def __init__(
        self,
        signals: Sequence[signal.Signals],
        then: OnPreempt,
        directory: RunDirectory,
        limit: TimeLimit | None = None,
    ) -> None:
        self.ended_by: str | None = None
        self._number: signal.Signals | None = None  # what that raises
        self._limit = limit
        self._deadline: Deadline | None = None
        self._signals = signals
        self._then = then
        self._directory = directory
        self._ranks = directory.ranks
        self._watch: SignalWatch | None = None
        self._rank_watch: RankWatch | None = None
        self._votes: SignalConsensus | None = None

    def listen(self, training: FrameType | None) -> None:
        """Training begins, in this frame."""
        self.ended_by, self._number = None, None
        self._watch = SignalWatch(self._signals, answer=self._ranks.is_main)
        if self._votes is None and (self._signals or self._limit is not None):
            self._votes = SignalConsensus("agreeing on a step to end at")
        if self._deadline is None and self._limit is not None:
            # With other ranks, a vote is read one step later.
            self._deadline = self._limit.begin(lag=int(self._ranks.world_size > 1))
        self._watch.install(training)
        self._end_rank_watch()
        if self._ranks.world_size > 1:
            self._rank_watch = RankWatch(self._ranks, training)

    def heed(self, step: int, *, wait: bool, ends: bool = False) -> bool:
        """A boundary, on every rank. Returns whether training ends here, which is said once.

        Args:
            step: Optimizer steps done.
            wait: Whether the ranks wait here for each other's vote; else it is read at the next boundary.
            ends: Whether training ends here by itself. A time limit has nothing to end then.
        """
        if self._rank_watch is not None:
            self._rank_watch.step = step
        if self._votes is None or self._watch is None or self.ended_by is not None:
            return False
        vote = self._votes.cast(self._vote(step), wait=wait)
        if vote == 0 or (vote == _DUE and ends):
            return False
        self._number = signal.SIGTERM if vote == _DUE else signal.Signals(vote - 1)
        self.ended_by = TIME_LIMIT if vote == _DUE else self._number.name
        self._directory.tell("preempted", step, why=self.ended_by)
        if self._ranks.is_main:
            then = "training ends at this step anyway" if ends else "run the same command to resume"
            logger.warning("%s: saving step %d, then ending; %s", self.ended_by, step, then)
        return True

    def _vote(self, step: int) -> int:
        assert self._watch is not None
        is_due = self._deadline is not None and self._deadline.is_due(step, self._directory.slowest_save)
        return self._watch.received + 1 if self._watch.received is not None else _DUE * is_due

    def stop_listening(self) -> None:
        """Training is over."""
        self._end_rank_watch()
        if self._watch is not None:
            self._watch.put_back()

    def _end_rank_watch(self) -> None:
        if self._rank_watch is not None:
            self._rank_watch.stop()
            self._rank_watch = None

    def deliver(self) -> None:
        """Let the signal do what it would have done, once; called when all is on the disk, and returns if that does."""
        watch, self._watch = self._watch, None
        if watch is None:
            return
        number = self._number or watch.received
        if self.ended_by is not None:
            # The first process that ends may take with it what the others still need: the store, the launcher.
            self._ranks.barrier(what=f"ending together after {self.ended_by}")
        if number is not None and self._then == "raise":
            watch.deliver(number)
        elif number is not None and self.ended_by != TIME_LIMIT:
            watch.tell_others(number)
