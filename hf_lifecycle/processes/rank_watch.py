"""While ranks train together, each shows the others that it lives; one that does not is named, and the training ends.

A rank that is stopped, or whose interpreter is stuck, is waited for in a collective of training, which says nothing for
half an hour. So each rank has a thread that writes a heartbeat and looks at those of the others. Promise: a rank that
has none for the time limit (``HF_LIFECYCLE_TIMEOUT``) is named in the log of every other rank, with the step after
which it was last seen, and their processes end, with status 1, so that a launcher can start the training again. What
was committed is intact: a save is staged until it is complete. A rank whose main thread stays at one place for the time
limit, while it lives, is named with the stack of that thread, and training continues: it may be a long evaluation.

If the store is gone, with rank 0 or the launcher that held it, the process ends as well.

Not promised: the stack of a process that is stopped, which no other can read.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from contextlib import suppress
from types import FrameType
from typing import Any

from hf_lifecycle.processes.preemption import TrainingFrame
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["RankWatch"]

logger = logging.getLogger("hf_lifecycle")

_LONGEST_BEAT = 5.0  # seconds between two heartbeats
_LAST_LOOK = 5.0  # seconds that the thread may take to end: it waits for the store at most
_GRACE = 1.5  # of the time limit: whoever waits in an exchange raises an error that says more before that
_OVER = "over"
_FRAMES = 12  # innermost ones of a stack


class RankWatch:
    """Watches the other ranks during one training. Make it at the same place on every rank.

    Args:
        training: The frame that runs the training. When it has been left, there is nothing to watch any more.

    Attributes:
        step: Optimizer steps done, which the others are shown.
    """

    def __init__(self, ranks: Ranks, training: FrameType | None) -> None:
        self.step = 0
        self._ranks = ranks
        self._store = ranks.private_store(what="watching each other", for_thread=True)
        self._training = TrainingFrame(training)
        self._every = min(_LONGEST_BEAT, ranks.timeout / 5)
        self._over = threading.Event()
        self._place: tuple[Any, ...] = ()  # of the main thread, and since when it is there
        self._since = time.monotonic()
        self._said: set[str] = set()
        self._shown: dict[int, tuple[int, bool, str]] = {}  # by rank 0 to the others: the last about each
        self._thread = threading.Thread(target=self._watch, name="hf_lifecycle-watch", daemon=True)
        self._thread.start()
        # Invariant: at the end of the interpreter the thread is not in the store, or the process would be aborted.
        weakref.finalize(self, _end, self._thread, self._over)

    def stop(self) -> None:
        """This rank has nothing to wait for any more, and is not waited for."""
        _end(self._thread, self._over)
        with suppress(RuntimeError):  # the store is gone with the others
            self._store.set(f"beat/{self._ranks.rank}", _OVER)

    def _watch(self) -> None:
        try:
            self._beat_and_look()
        except RuntimeError as error:
            if self._over.wait(self._ranks.timeout * (_GRACE - 1)) or not self._training.is_below(_main_frame()):
                return
            gone = f"the store of torch.distributed is gone, with rank 0 or the launcher: this process ends ({error})"
            self._say(0, gone, ends=True)

    def _beat_and_look(self) -> None:
        # Rank 0 looks at all, and the others at rank 0 and at what it says: so the store has little to do.
        rank, now = self._ranks.rank, time.monotonic()
        seen = dict.fromkeys(range(1, self._ranks.world_size) if self._ranks.is_main else [0], ("", now))
        beats, looked = 0, now
        while not self._over.is_set():
            late, looked = time.monotonic() - looked > 3 * self._every, time.monotonic()
            if late:  # all ranks may have been stopped together, by a scheduler or a person
                seen = {other: (beat, looked) for other, (beat, _) in seen.items()}
                self._since = looked
            main = _main_frame()
            if not self._training.is_below(main):
                return  # an exception ended it, of which nobody told
            beats += 1
            self._store.set(f"beat/{rank}", json.dumps([beats, self.step, self._stack(main)]))
            for other in seen:
                seen[other] = self._look_at(other, *seen[other])
            if not self._ranks.is_main and self._store.check(["said"]):
                for number, ends, text in json.loads(self._store.get("said")):
                    if number != rank:
                        self._say(number, text, ends=ends)
            self._over.wait(self._every)

    def _look_at(self, rank: int, before: str, since: float) -> tuple[str, float]:
        """Name a rank that hangs or is silent. Returns its last beat, and since when that is the last."""
        key = f"beat/{rank}"
        beat = self._store.get(key).decode() if self._store.check([key]) else ""
        if beat != before:
            stack = json.loads(beat)[2] if beat != _OVER else None
            if stack is not None:
                said = f"rank {rank} is at one place for {self._ranks.timeout:.0f} s, after step {json.loads(beat)[1]}"
                self._say(rank, f"{said}; its main thread:\n{stack}")
            return beat, time.monotonic()
        if beat != _OVER and self._is_silent(since):
            where = f"last seen after step {json.loads(beat)[1]}" if beat else "never seen in this training"
            said = (
                f"rank {rank} is silent for {self._ranks.timeout:.0f} s (HF_LIFECYCLE_TIMEOUT), {where}: its process "
                "is stopped, stuck or gone, and its stack cannot be read; this process ends, so that the training can "
                "be started again. What was committed is intact"
            )
            self._say(rank, said, ends=self._is_silent(since, _GRACE))
        return beat, since

    def _say(self, rank: int, text: str, *, ends: bool = False) -> None:
        """Log it once, let the other ranks say it too, and end this process if it ``ends``."""
        if text not in self._said:
            self._said.add(text)
            logger.error("%s", text)
        if self._ranks.is_main:
            self._shown[rank] = rank, ends, text
            with suppress(RuntimeError):  # the launcher held the store
                self._store.set("said", json.dumps(list(self._shown.values())))
        if ends:
            for stream in (sys.stdout, sys.stderr):
                with suppress(AttributeError, OSError, ValueError):
                    stream.flush()
            os._exit(1)  # the main thread waits in a collective, which no exception reaches

    def _is_silent(self, since: float, times: float = 1.0) -> bool:
        return time.monotonic() - since >= self._ranks.timeout * times

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


def _end(thread: threading.Thread, over: threading.Event) -> None:
    over.set()
    if threading.current_thread() is not thread:
        thread.join(_LAST_LOOK)


def _main_frame() -> FrameType | None:
    return sys._current_frames().get(threading.main_thread().ident or 0)
