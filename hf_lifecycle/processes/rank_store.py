"""What the ranks of one process group lay down for each other in the key-value store of ``torch.distributed``.

Promise: no rank reads what an earlier attempt, an earlier group or an earlier training left in the same store, and no
rank waits longer than the time limit for a rank that is silent.

- **A room for each meeting.** A store outlives the processes (``torchrun --max-restarts``: the agent holds it) and the
  group. So all keys begin with a name that the ranks agree on when they meet, and that was never used before. Each rank
  but the first lays down a random word; rank 0 writes the name of the room under that very word; the rank answers in
  the room. A word, or an answer, of an earlier attempt is never waited for.
- **The limit is on silence, not on work.** A rank that works while others wait (``working``) has a thread that writes a
  heartbeat every few seconds, and so does rank 0 while it waits for others. The thread only calls ``Store.set``, on a
  connection of this package's own, which torch locks around each call.
- **A process that has ended is not waited for**, where that can be seen: on the same machine.

Not promised: that a rank which hangs while it works is found. Its process lives, and beats; who waits for it logs that
once per time limit, and the limits of training's own collectives hold.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import xxhash
from torch.distributed.distributed_c10d import PrefixStore

from hf_lifecycle.errors import RankUnreachable
from hf_lifecycle.processes.ended import has_ended, process_mark

__all__ = ["TIMEOUT_VARIABLE", "RankStore", "time_limit"]

logger = logging.getLogger(__name__)

TIMEOUT_VARIABLE = "HF_LIFECYCLE_TIMEOUT"  # seconds of silence after which a rank counts as gone
_TIMEOUT = 600.0  # or what the process group waits for, where that is longer
_PREFIX = "hf_lifecycle"
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.0002, 0.05  # seconds between two looks; a tenth of the time waited so far
_LONGEST_BEAT = 5.0  # seconds between two heartbeats


class RankStore:
    """The default group's store as one rank sees it; ``timeout``: seconds of silence after which a rank is gone."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = timeout
        self.room = ""
        self._origin = store  # rank 0's process may hold the server
        # A call of torch's that blocks in the store must not hold up a heartbeat.
        self._store: Any = PrefixStore(_PREFIX, store.clone())  # torch's stub lacks has_extended_api
        self._every = min(_LONGEST_BEAT, timeout / 5)
        self._beats = 0
        self._is_working = False
        self._marks: dict[int, str] = {}  # of the processes of those that are waited for

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def private(self, name: str, *, for_thread: bool = False) -> Any:
        """A store for something else that the ranks of this room do together; of its own connection for a thread."""
        return PrefixStore(
            f"{_PREFIX}/{self.room}/private/{name}", self._origin.clone() if for_thread else self._origin
        )

    # Meeting

    def meet(self, what: str) -> None:
        """Come together with the other ranks in a new room; all of them do, at the same place.

        Raises:
            RankUnreachable: A rank did not come in time.
        """
        word, self.room = uuid.uuid4().hex, ""
        with self._reachable(what):
            if self.is_main:
                self.room = word
                self._welcome(what)
                return
            self._store.set(f"word/{self.rank}", word)
            deadline = time.monotonic() + self.timeout
            for _ in self._looks():
                if self._store.check([f"welcome/{word}"]):
                    break
                if time.monotonic() >= deadline:
                    raise RankUnreachable(what, [0], self.timeout)
            self.room, _, self._marks[0] = self._store.get(f"welcome/{word}").decode().partition(" ")
            self.set(f"here/{self.rank}", process_mark())

    def _welcome(self, what: str) -> None:
        """On rank 0: show the others the room until all are in it."""
        missing, shown, deadline = set(range(1, self.world_size)), set(), time.monotonic() + self.timeout
        beat = time.monotonic() + self._every
        for _ in self._looks():
            missing = {rank for rank in missing if not self.has(f"here/{rank}")}
            if not missing:
                break
            for rank in missing:
                if self._store.check([f"word/{rank}"]):
                    word = self._store.get(f"word/{rank}").decode()
                    if word not in shown:  # it may be one of an earlier meeting, which nobody looks for any more
                        self._store.set(f"welcome/{word}", f"{self.room} {process_mark()}")
                        shown.add(word)
            now = time.monotonic()
            if now >= deadline:
                raise RankUnreachable(what, sorted(missing), self.timeout)
            if now >= beat:
                beat = now + self._every
                self._beat(what)
        others = range(1, self.world_size)
        self._marks = dict(zip(others, self.get_all(f"here/{rank}" for rank in others), strict=True))
        self.delete(*(f"here/{rank}" for rank in others))
        for word in shown:
            self._store.delete_key(f"welcome/{word}")

    # Keys of the room

    def set(self, key: str, value: str) -> None:
        with self._reachable():
            self._store.set(f"{self.room}/{key}", value)

    def say(self, number: int, text: str) -> None:
        """Lay down what this rank, another than rank 0, says in an exchange; counted by what it is."""
        self.set(f"{number}/{self.rank}", text)
        self.count(_counter_of(number, text), 1)
        self.count(f"{number}/said", 1)

    def said(self, number: int, *, all_came: bool) -> list[tuple[Sequence[int], str]]:
        """On rank 0: what the others said, where all of them have come, or else those that have, by ranks.

        Where all said the same, which is usual, it is read once. The counters of what they said are deleted.
        """
        others = range(1, self.world_size)
        if all_came:
            text = self.get(f"{number}/1")
            if self.count(_counter_of(number, text)) == len(others):
                self.delete(_counter_of(number, text))
                return [(others, text)]
        came = others if all_came else [rank for rank in others if self.has(f"{number}/{rank}")]
        found = self.get_all(f"{number}/{rank}" for rank in came)
        self.delete(*(_counter_of(number, text) for text in set(found)))
        return [([rank], text) for rank, text in zip(came, found, strict=True)]

    def get_all(self, keys: Iterable[str]) -> list[str]:
        """What is laid down under these keys, all of which are there; in one request, if the store has that."""
        names, store = [f"{self.room}/{key}" for key in keys], self._store
        with self._reachable():
            found = store.multi_get(names) if store.has_extended_api() else [store.get(name) for name in names]
            return [value.decode() for value in found]

    def has(self, *keys: str) -> bool:
        """Whether all of ``keys`` are there."""
        with self._reachable():
            return bool(self._store.check([f"{self.room}/{key}" for key in keys]))

    def get(self, key: str) -> str:
        with self._reachable():
            return str(self._store.get(f"{self.room}/{key}").decode())

    def delete(self, *keys: str) -> None:
        with self._reachable():
            for key in keys:
                self._store.delete_key(f"{self.room}/{key}")

    def count(self, key: str, more: int = 0) -> int:
        """Add to a number; returns what it is then."""
        with self._reachable():
            return int(self._store.add(f"{self.room}/{key}", more))

    def wait(
        self, ranks: Sequence[int], key_of: Callable[[int], str], what: str, *, unless: str = "", counter: str = ""
    ) -> bool:
        """Wait until each of ``ranks`` has set its key.

        Args:
            unless: A key that ends the waiting as well.
            counter: The number of those that are there, if it is counted: to ask for one is less work than for all.

        Returns:
            Whether they are all there; False where ``unless`` is, and not all of them are.

        Raises:
            RankUnreachable: Ranks were silent for as long as the time limit, or their processes have ended.
        """
        began = told = time.monotonic()
        look = began + self._every
        heard: dict[int, tuple[float, str]] = {}  # when each has beaten last, and what it said
        for _ in self._looks():
            if self.count(counter) >= len(ranks) if counter else self.has(*map(key_of, ranks)):
                return True
            if unless and self.has(unless):
                return False
            now = time.monotonic()
            if now < look:
                continue
            look = now + self._every
            missing = [rank for rank in ranks if not self.has(key_of(rank))]
            if not missing:  # a rank was interrupted before it was counted
                return True
            ended = [rank for rank in missing if has_ended(self._marks.get(rank, ""))]
            ended = [rank for rank in ended if not self.has(key_of(rank))]  # it may have said something before
            if ended:
                raise RankUnreachable(what, ended, self.timeout, "the process has ended")
            for rank in missing:
                beat = self.get(f"beat/{rank}") if self.has(f"beat/{rank}") else ""
                since, before = heard.get(rank, (began, ""))
                heard[rank] = (since if beat == before else now), beat
            silent = [rank for rank in missing if now - heard[rank][0] >= self.timeout]
            if silent:
                raise RankUnreachable(what, silent, self.timeout)
            if self.is_main:
                self._beat(f"waiting for ranks {missing}: {what}")
            if now - told >= self.timeout and self.rank <= 1:  # the others would say the same
                told = now
                each = "; ".join(f"rank {rank}: {heard[rank][1].partition(' ')[2]}" for rank in missing)
                logger.warning("%s: waited for %.0f s so far; still working: %s", what, now - began, each)
        raise AssertionError("the keys of an exchange")

    # Heartbeats

    @contextmanager
    def working(self, what: str) -> Iterator[None]:
        """Beat while the block runs, so that whoever waits for this rank knows that it works."""
        if self._is_working or not self.room:
            yield
            return
        over = threading.Event()
        thread = threading.Thread(target=self._beat_until, args=(over, what), name=f"{_PREFIX}-heartbeat")
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter ends: the work is done all the same
            yield
            return
        self._is_working = True
        try:
            yield
        finally:
            over.set()
            thread.join()
            self._is_working = False

    def _beat_until(self, over: threading.Event, what: str) -> None:
        with suppress(RankUnreachable):  # the store is gone: the next exchange says so
            while not over.wait(self._every):
                self._beat(what)

    def _beat(self, what: str) -> None:
        self._beats += 1
        self.set(f"beat/{self.rank}", f"{self._beats} {what}")

    @staticmethod
    def _looks() -> Iterator[None]:
        """Look now, soon, and then ever less often. No call blocks in the store, so a signal is heeded at once."""
        began = time.monotonic()
        while True:
            yield
            time.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, (time.monotonic() - began) / 10)))

    @contextmanager
    def _reachable(self, what: str = "an exchange between ranks") -> Iterator[None]:
        try:
            yield
        except RankUnreachable:
            raise
        except RuntimeError as error:
            first = str(error).partition("\n")[0]
            why = f"the store of torch.distributed is gone, with rank 0 or the launcher that held it ({first})"
            raise RankUnreachable(what, [] if self.is_main else [0], self.timeout, why) from error


def _counter_of(number: int, text: str) -> str:
    return f"{number}/said {xxhash.xxh3_128_hexdigest(text.encode())}"


def time_limit(store: Any) -> float:
    """Seconds of silence after which a rank counts as gone: ``HF_LIFECYCLE_TIMEOUT``, else from the group's store.

    Raises:
        ValueError: The variable is not a number of seconds above 0.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    if not text:
        return _TIMEOUT if store is None else max(_TIMEOUT, float(store.timeout.total_seconds()))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r} must be a number of seconds above 0")
    return seconds
