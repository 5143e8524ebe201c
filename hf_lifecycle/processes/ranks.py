"""The processes of one training, and what they tell each other: bounded in time, and with names when one is missing.

Promise: an exchange ends on every rank with the same answer, or on every rank with an error that says which rank was
waited for, or failed, and in what. Exchanges go through the store of ``torch.distributed``, not through collectives: so
they work beside any backend, and touch no device. On one process they cost nothing.

**The rule.** Exchanges are numbered, and every rank is at the same number: also after an error.

- A rank whose block (:meth:`Ranks.agree`) raises speaks at its next exchange: it says what failed, and how many blocks
  around it stay open. Whatever exchange the others are at, that is the answer to it: they raise ``RankFailed``, leave
  the same blocks without a word, and all are at the next number.
- An interrupt (``KeyboardInterrupt``, ``SystemExit``) says the same and waits for no one; rank 0 answers as soon as it
  sees that, without the ranks at work; if it has answered, at the next exchange. ``all_present`` is then False.
- A rank that is silent for the time limit, or came to something else although nobody failed, is missing:
  ``RankUnreachable`` on all that are there, and on a late one when it comes (to the first exchange: after its own time
  limit). All blocks are left.
- A rank that fails outside any block tells nobody. It is missing, unless its process ends the training anyway.

The time limit is on silence, not on work: a rank in a block, or in :meth:`Ranks.working`, has a heartbeat (see
:mod:`hf_lifecycle.processes.rank_store`).

Not promised: speed. An exchange takes some round trips to the store (less than a millisecond), on each rank as many
however many ranks there are; it belongs to saves, resumes and stops, not to every step. All ranks make the same
exchanges in the same order, on their main threads.
"""

from __future__ import annotations

import base64
import json
import multiprocessing.util
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch.distributed as dist

from hf_lifecycle.errors import RankFailed, RankUnreachable
from hf_lifecycle.processes.rank_store import RankStore, time_limit
from hf_lifecycle.processes.verdicts import Told, in_words, values_of, verdict
from hf_lifecycle.torch_internals import default_store

__all__ = ["Ranks"]

_LONGEST_FAREWELL = 10.0  # seconds that rank 0's process stays for the others at its end


class Ranks:
    """This process among those of the training. Take it with :meth:`current`.

    Attributes:
        timeout: Seconds of silence after which a rank counts as gone.
        all_present: False after an exchange that a rank was missing from, or that it left by an interrupt: whoever
            asks the others something then waits in vain. The same on every rank.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None, *, timeout: float | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self.timeout = time_limit(store) if timeout is None else timeout
        self.all_present = True
        self._store: Any = (
            RankStore(store, rank, world_size, self.timeout) if world_size > 1 and store is not None else None
        )  # None: nobody is asked
        self._number = self._private = 0
        self._blocks: list[str] = []
        self._failure: RankFailed | RankUnreachable | None = None  # while the blocks that it ends are left
        self._stay = 0  # how many blocks that does not end
        self._unforgotten: list[int] = []
        self._readers = 0  # of rank 0's last answer

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of ``torch.distributed``'s default group; this process alone where that is not started."""
        global _last
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        group = dist.group.WORLD
        # Invariant: one object for each group, since it counts the exchanges, and the count is part of their names.
        if _last is None or _last[0]() is not group:
            _last = (
                weakref.ref(group),
                cls(dist.get_rank(), dist.get_world_size(), default_store()),
            )
            if _last[1].is_main:  # not atexit, which a process of multiprocessing (notebook_launcher) never comes to
                multiprocessing.util.Finalize(None, _last[1]._let_all_read, exitpriority=0)
        return _last[1]

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes what is written once."""
        return self.rank == 0

    def removes_after(self, error: BaseException) -> bool:
        """Whether this rank removes what a failed save has left: rank 0, or the others where that was interrupted.

        They may still be writing when rank 0 leaves.
        """
        if self.is_main:
            return self.world_size == 1 or isinstance(error, Exception)
        return not self.all_present and isinstance(error, RankFailed) and 0 in error.causes

    def begin(self) -> None:
        """Meet anew at the next exchange: whatever became of an earlier training, all count from 0 again."""
        if self._store is not None:
            self._store.room, self._failure, self._unforgotten = "", None, []

    def private_store(self, *, what: str, for_thread: bool = False) -> Any:
        """A new store, which nobody else has written to, for something else that these ranks do together.

        It is ``for_thread`` where a thread uses it that must not wait for calls of the main one.
        """
        store = self._met(what)
        self._private += 1
        return store.private(str(self._private), for_thread=for_thread)

    def gather(self, value: Any, *, what: str) -> list[Any]:
        """Every rank's ``value`` (anything that JSON holds), in the order of the ranks; ``what`` it is, for errors.

        Raises:
            RankFailed: Another rank failed before it came here.
            RankUnreachable: A rank was silent for the time limit, or came to another exchange.
        """
        return [value] if self.world_size == 1 else self._exchange(what, value)

    def gather_bytes(self, data: bytes, *, what: str) -> list[bytes]:
        """As :meth:`gather`, for bytes: a few megabytes of a rank at most."""
        if self.world_size == 1:
            return [data]
        return [base64.b64decode(text) for text in self.gather(base64.b64encode(data).decode(), what=what)]

    def broadcast(self, value: Any, *, what: str) -> Any:
        """Rank 0's ``value`` on every rank; what the others give is not looked at."""
        return self.gather(value if self.is_main else None, what=what)[0]

    def barrier(self, *, what: str) -> None:
        self.gather(None, what=what)

    def working(self, what: str) -> AbstractContextManager[None]:
        """A block of work that others may wait for, of whatever length; one of :meth:`agree` is one already."""
        return nullcontext() if self._store is None else self._store.working(what)

    @contextmanager
    def agree(self, *, what: str, tell: Callable[[BaseException], str] | None = None) -> Iterator[Told]:
        """Run a block on every rank; it has succeeded if it has on all of them.

        Args:
            tell: What the others are told of an error here; default: its type and its message.

        Yields:
            What they tell each other in the same exchange.

        Raises:
            RankFailed: It raised on other ranks; where it raised here, that error continues.
            RankUnreachable: A rank was silent for the time limit.
        """
        told = Told()
        if self.world_size == 1:
            yield told
            told.each = [told.own]
            return
        store = self._met(what)
        self._blocks.append(what)
        try:
            try:
                with store.working(what):
                    yield told
            except BaseException as error:
                with suppress(RankFailed, RankUnreachable):  # this rank's own error says more
                    if not isinstance(error, Exception):
                        self.withdraw(error)
                    elif self._failure is None:
                        self._exchange(what, failed=in_words(error) if tell is None else tell(error))
                raise
            told.each = self._exchange(what, told.own)
        finally:
            self._blocks.pop()
            if len(self._blocks) <= self._stay:
                self._failure = None

    def announce(self, word: str, *, about: str) -> None:
        """Lay down a word about something that all ranks do before the next exchange; waits for no one."""
        if self.world_size > 1:
            self._met(about).set(f"{self._number}/{about}/{self.rank}", word)

    def announced(self, *, about: str) -> list[str]:
        """The words of all ranks, in their order.

        Raises:
            RankUnreachable: A rank was silent for the time limit.
        """
        store, number, every = self._met(about), self._number, range(self.world_size)
        with store.working(about):
            store.wait(every, lambda rank: f"{number}/{about}/{rank}", about)
        return store.get_all(f"{number}/{about}/{rank}" for rank in every)

    def withdraw(self, error: BaseException, what: str = "an exchange") -> None:
        """Tell the others, without waiting for them, that an interrupt ends what this rank does with them."""
        if self._store is None or not self._store.room or self._failure is not None:
            return
        what = self._blocks[-1] if self._blocks else what
        cause, stay = in_words(error), max(0, len(self._blocks) - 1)
        with suppress(RankUnreachable):
            if self.is_main:
                self._answer(self._number, {"what": what, "failed": {0: cause}, "stay": stay, "left": [0]})
            else:
                told = {"what": what, "value": None, "failed": cause, "stay": stay, "left": True}
                self._store.say(self._number, json.dumps(told))
                self._store.set(f"{self._number}/left", str(self.rank))
        self._number += 1
        self._fails(RankFailed(what, {self.rank: cause}), stay, all_present=False)

    def hear(self, what: str) -> None:
        """While waiting for the others in something else: raise if one of them has withdrawn."""
        store = self._store
        if store is not None and store.room and any(store.has(f"{self._number}/{key}") for key in ("left", "all")):
            self.barrier(what=what)

    def _met(self, what: str) -> RankStore:
        """The store, in a room that all ranks are in."""
        store: RankStore = self._store
        if not store.room:
            self._number = self._private = 0
            try:
                store.meet(what)
            except RankUnreachable as error:
                if self.is_main:  # those who came wait for the first answer
                    with suppress(RankUnreachable):
                        self._answer(0, {"what": what, "missing": list(error.ranks), "why": error.why})
                    self._number = 1
                raise
        return store

    def _exchange(self, what: str, value: Any = None, failed: str | None = None) -> list[Any]:
        """Tell the others something, and hear what they tell; or that something, or this rank's block, failed."""
        if self._failure is not None:  # of a block that the caller is still in
            raise self._failure
        store = self._met(what)
        told = json.dumps({"what": what, "value": value, "failed": failed, "stay": max(0, len(self._blocks) - 1)})
        number, self._number = self._number, self._number + 1
        try:
            if not self.is_main:
                store.say(number, told)
            answer = self._collect(number, what, told) if self.is_main else self._listen(number, what)
        except RankUnreachable as error:
            self._fails(error, 0, all_present=False)
            raise
        except BaseException as error:  # an interrupt; the others wait for an answer, or for the next exchange
            if self.is_main and not store.has(f"{number}/all"):
                self._number = number
            self.withdraw(error, what)
            raise
        if "missing" in answer:
            gone = RankUnreachable(answer["what"], answer["missing"], self.timeout, answer["why"])
            self._fails(gone, 0, all_present=False)
            raise gone
        if "failed" in answer:
            failure = RankFailed(answer["what"], {int(rank): cause for rank, cause in answer["failed"].items()})
            self._fails(failure, answer["stay"], all_present=not answer["left"])
            raise failure
        self.all_present = True
        return values_of(answer)

    def _fails(self, failure: RankFailed | RankUnreachable, stay: int, *, all_present: bool) -> None:
        self._failure, self._stay = (failure if len(self._blocks) > stay else None), stay
        self.all_present = all_present

    def _listen(self, number: int, what: str) -> dict[str, Any]:
        self._store.wait([0], lambda _: f"{number}/all", what)
        answer: dict[str, Any] = json.loads(self._store.get(f"{number}/all"))
        with suppress(RankUnreachable):  # the answer is here, whether or not the store still is
            self._store.delete(f"{number}/{self.rank}")  # each its own, since to rank 0 they would be many
            self._store.count(f"{number}/read", 1)
        return answer

    def _collect(self, number: int, what: str, told: str) -> dict[str, Any]:
        """On rank 0: wait for what every rank has to say, and tell it to all of them; ``told``: what it says itself."""
        store: RankStore = self._store
        counts = {"unless": f"{number}/left", "counter": f"{number}/said"}
        try:
            is_complete = store.wait(range(1, self.world_size), lambda rank: f"{number}/{rank}", what, **counts)
        except RankUnreachable as error:
            answer = {"what": what, "missing": list(error.ranks), "why": error.why}
            self._unforgotten.append(number)
            with suppress(RankUnreachable):
                self._answer(number, answer)
            return answer
        answer = verdict([([0], told), *store.said(number, all_came=is_complete)], what)
        self._answer(number, answer)
        store.delete(*(f"{number}/{rank}" for rank in answer.get("left", ())))
        if is_complete:  # all came, so all have read what was before
            for before in self._unforgotten:
                store.delete(*(f"{before}/{key}" for key in ("said", "all", "read", "left")))
            self._unforgotten = []
        self._unforgotten.append(number)
        return answer

    def _answer(self, number: int, answer: dict[str, Any]) -> None:
        self._readers = self.world_size - 1 - len({*answer.get("missing", ()), *answer.get("left", ())} - {0})
        self._store.set(f"{number}/all", json.dumps(answer))

    def _let_all_read(self) -> None:
        """On rank 0, whose process may hold the store: do not end before the others have read the last answer."""
        store: RankStore = self._store
        deadline = time.monotonic() + min(_LONGEST_FAREWELL, self.timeout)
        with suppress(RankUnreachable):  # the store is gone already: nobody can read it any more
            while store.room and self._number and store.count(f"{self._number - 1}/read") < self._readers:
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.01)


_last: tuple[Any, Ranks] | None = None  # the default group, and its ranks
