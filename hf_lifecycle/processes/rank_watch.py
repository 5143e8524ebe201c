"""While ranks train together, each shows the others that it lives; one that does not is named, and the training ends.

A rank that is stopped, or whose interpreter is stuck, is waited for in a collective of training, which says nothing for
half an hour. So each rank has a thread that writes a heartbeat and looks at those of the others. Promise: a rank that
has none for the time limit (``HF_LIFECYCLE_TIMEOUT``) is named in the log of every other rank, with the step after
which it was last seen, and their processes end, with status 1, so that a launcher can start the training again. What
was committed is intact: a save is staged until it is complete. A rank whose main thread stays at one place for the time
limit, while it lives, is named with the stack of that thread, and training continues: it may be a long evaluation.

Not promised: the stack of a process that is stopped, which no other can read; that a rank is found whose store is gone.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any

from hf_lifecycle.processes.ranks import Ranks

__all__ = ["RankWatch"]

logger = logging.getLogger("hf_lifecycle")

_LONGEST_BEAT = 5.0  # seconds between two heartbeats
_GRACE = 1.5  # of the time limit: whoever waits in an exchange raises an error that says more before that
_OVER = "over"
_FRAMES = 12  # innermost ones of a stack


class RankWatch:
    """Watches the other ranks during one training. Make it at the same place on every rank.

    Args:
        ranks: The processes of the training; more than one.
        training: The frame that runs the training. When it has been left, there is nothing to watch any more.

    Attributes:
        step: Optimizer steps done, which the others are shown.
    """

    def __init__(self, ranks: Ranks, training: FrameType | None) -> None:
        self.step = 0
        self._ranks = ranks
        self._store = ranks.private_store(what="watching each other", for_thread=True)
        self._training = None if training is None else (id(training), training.f_code)
        self._every = min(_LONGEST_BEAT, ranks.timeout / 5)
        self._over = threading.Event()
        self._place: tuple[Any, ...] = ()  # of the main thread, and since when it is there
        self._since = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="hf_lifecycle-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """This rank has nothing to wait for any more, and is not waited for."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(self._every)
        with suppress(RuntimeError):  # the store is gone with the others
            self._store.set(f"beat/{self._ranks.rank}", _OVER)

    def _watch(self) -> None:
        now = time.monotonic()
        others = [rank for rank in range(self._ranks.world_size) if rank != self._ranks.rank]
        seen: dict[int, tuple[str, float]] = dict.fromkeys(others, ("", now))
        named: set[int] = set()
        beats, looked = 0, now
        with suppress(RuntimeError):  # the store is gone: the next exchange, or the launcher, says so
            while not self._over.is_set():
                late, looked = time.monotonic() - looked > 3 * self._every, time.monotonic()
                if late:  # all ranks may have been stopped together, by a scheduler or a person
                    seen = {rank: (beat, looked) for rank, (beat, _) in seen.items()}
                    self._since = looked
                main = sys._current_frames().get(threading.main_thread().ident or 0)
                if not self._is_running(main):
                    return  # an exception ended it, of which nobody told
                beats += 1
                self._store.set(f"beat/{self._ranks.rank}", json.dumps([beats, self.step, self._stack(main)]))
                for rank in others:
                    self._look_at(rank, seen, named)
                silent = {
                    rank: since for rank, (beat, since) in seen.items() if beat != _OVER and self._is_silent(since)
                }
                self._name(silent, seen, named)
                self._over.wait(self._every)

    def _look_at(self, rank: int, seen: dict[int, tuple[str, float]], named: set[int]) -> None:
        key = f"beat/{rank}"
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        if beat == seen[rank][0]:
            return
        seen[rank] = beat, time.monotonic()
        stack = json.loads(beat)[2] if beat != _OVER else None
        if stack is None:
            named.discard(rank)
        elif rank not in named:
            named.add(rank)
            said = "rank %d is at one place for %.0f s, after step %d; its main thread:\n%s"
            logger.warning(said, rank, self._ranks.timeout, json.loads(beat)[1], stack)

    def _is_silent(self, since: float, times: float = 1.0) -> bool:
        return time.monotonic() - since >= self._ranks.timeout * times

    def _name(self, silent: dict[int, float], seen: dict[int, tuple[str, float]], named: set[int]) -> None:
        for rank in silent.keys() - named:
            named.add(rank)
            last = seen[rank][0]
            where = f"last seen after step {json.loads(last)[1]}" if last else "never seen in this training"
            said = (
                "rank %d is silent for %.0f s (HF_LIFECYCLE_TIMEOUT), %s: its process is stopped, stuck or gone, and "
                "its stack cannot be read; this process ends, so that the training can be started again. What was "
                "committed is intact"
            )
            logger.error(said, rank, self._ranks.timeout, where)
        if any(self._is_silent(since, _GRACE) for since in silent.values()):
            for stream in (sys.stdout, sys.stderr):
                with suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(1)  # the main thread waits in a collective, which no exception reaches

    def _stack(self, main: FrameType | None) -> str | None:
        """The stack of the main thread, if it is at one place for the time limit."""
        place: list[Any] = []
        frame = main
        while frame is not None and len(place) < 2 * _FRAMES:
            place += [id(frame), frame.f_lasti]
            frame = frame.f_back
        if tuple(place) != self._place:
            self._place, self._since = tuple(place), time.monotonic()
        if main is None or not self._is_silent(self._since):
            return None
        return "".join(traceback.format_stack(main)[-_FRAMES:])

    def _is_running(self, frame: FrameType | None) -> bool:
        if self._training is None:
            return True
        while frame is not None:
            if (id(frame), frame.f_code) == self._training:
                return True
            frame = frame.f_back
        return False
