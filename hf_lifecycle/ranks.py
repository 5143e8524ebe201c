"""The processes of one training, and what they tell each other: bounded in time, and with names when one is missing.

Promise: an exchange ends on every rank with the same answer, or on every rank with an error that says which rank was
waited for, or failed, and in what. Exchanges go through the key-value store that ``torch.distributed`` was started
with, not through collectives: so they work beside any backend, touch no device, and cannot be mixed up with training's
own. On one process they cost nothing.

Not promised: speed. An exchange takes some round trips to the store (about a millisecond); it belongs to saves, resumes
and stops, not to every step. All ranks make the same exchanges in the same order, on their main threads.
"""

from __future__ import annotations

import atexit
import base64
import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from hf_lifecycle.errors import RankFailed, RankUnreachable

__all__ = ["TIMEOUT_VARIABLE", "Ranks"]

TIMEOUT_VARIABLE = "HF_LIFECYCLE_TIMEOUT"  # seconds that an exchange waits for the other ranks
_TIMEOUT = 600.0
_SLICE = 1.0  # seconds that the store is asked for at once, so that a signal is not kept waiting
_LONGEST_FAREWELL = 10.0  # seconds that rank 0's process stays for the others at its end
_ROOM = "hf_lifecycle"


class Ranks:
    """This process among those of the training. Take it with :meth:`current`.

    Attributes:
        rank: The global rank of this process.
        world_size: How many processes there are.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, store: Any = None, *, timeout: float | None = None) -> None:
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._timeout = _timeout() if timeout is None else timeout
        self._number = 0

    @classmethod
    def current(cls) -> Ranks:
        """The ranks of ``torch.distributed``'s default group; this process alone where that is not started."""
        global _last
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        store = dist.distributed_c10d._get_default_store()
        # Invariant: one object for each store, since it counts the exchanges, and the count is part of their names.
        if _last is None or _last._store is not store:
            _last = cls(dist.get_rank(), dist.get_world_size(), store)
            if _last.is_main:
                atexit.register(_last._let_all_read)
        return _last

    @property
    def is_main(self) -> bool:
        """Whether this process is rank 0, which writes what is written once."""
        return self.rank == 0

    def gather(self, value: Any, *, what: str) -> list[Any]:
        """Every rank's ``value`` (anything that JSON holds), in the order of the ranks, on every rank.

        Args:
            value: What this rank tells.
            what: What the exchange is about, for the error.

        Raises:
            RankUnreachable: A rank did not come in time, or came with another exchange.
        """
        if self.world_size == 1:
            return [value]
        number, self._number = self._number, self._number + 1
        self._set(f"{number}/{self.rank}", {"what": what, "value": value})
        if not self.is_main:
            # Longer than rank 0 waits, so that its answer, which names the missing, comes in time.
            told = self._wait([f"{number}/all"], what, self._timeout * 1.1 + 5, [0])[0]
            with contextlib.suppress(RuntimeError):  # the answer is here, whether or not the store still is
                self._store.add(f"{_ROOM}/{number}/read", 1)
        else:
            told = self._collect(number, what)
            self._forget(number - 1)
        if told["missing"]:
            raise RankUnreachable(what, told["missing"], self._timeout, told["why"])
        values: list[Any] = told["values"]
        return values

    def gather_bytes(self, data: bytes, *, what: str) -> list[bytes]:
        """As :meth:`gather`, for bytes: a few megabytes of a rank at most."""
        if self.world_size == 1:
            return [data]
        return [base64.b64decode(text) for text in self.gather(base64.b64encode(data).decode(), what=what)]

    def broadcast(self, value: Any, *, what: str) -> Any:
        """Rank 0's ``value`` on every rank; what the others give is not looked at."""
        return self.gather(value if self.is_main else None, what=what)[0]

    def barrier(self, *, what: str) -> None:
        """Return when every rank has come here."""
        self.gather(None, what=what)

    @contextmanager
    def agree(self, *, what: str, tell: Callable[[BaseException], str] | None = None) -> Iterator[None]:
        """Run a block on every rank; it has succeeded if it has on all of them.

        Args:
            what: What the block does, for the error.
            tell: What the others are told of an error here; default: its type and its message.

        Raises:
            RankFailed: It raised on other ranks; where it raised here, that error goes on.
            RankUnreachable: A rank did not come in time.
        """
        try:
            yield
        except BaseException as error:
            if isinstance(error, RankUnreachable):
                raise  # an exchange within the block: nobody comes to this one, or all know already
            told = f"{type(error).__name__}: {error}" if tell is None else tell(error)
            if isinstance(error, Exception):
                with suppress(RankUnreachable):  # this rank's own error says more
                    self.gather(told, what=what)
            elif self.world_size > 1:  # an interrupt waits for no one
                self._set(f"{self._number}/{self.rank}", {"what": what, "value": told})
            raise
        causes = dict(enumerate(self.gather(None, what=what)))
        failed = {rank: cause for rank, cause in causes.items() if cause is not None}
        if failed:
            raise RankFailed(what, failed)

    def _collect(self, number: int, what: str) -> dict[str, Any]:
        """On rank 0: wait for what every rank has to say, and tell it to all of them."""
        everyone = range(self.world_size)
        told: dict[str, Any] = {"missing": [], "why": "", "values": []}
        try:
            said = self._wait([f"{number}/{rank}" for rank in everyone], what, self._timeout, list(everyone))
            elsewhere = {rank: one["what"] for rank, one in zip(everyone, said, strict=True) if one["what"] != what}
            if elsewhere:
                told["missing"] = list(elsewhere)
                told["why"] = "; ".join(f"rank {rank} came to: {other}" for rank, other in elsewhere.items())
                errors = [one["value"] for rank, one in zip(everyone, said, strict=True) if rank in elsewhere]
                told["why"] += "".join(f", with {error}" for error in errors if isinstance(error, str))
            told["values"] = [one["value"] for one in said]
        except RankUnreachable as error:
            told["missing"], told["why"] = list(error.ranks), error.why
        self._set(f"{number}/all", told)
        return told

    def _wait(self, keys: Sequence[str], what: str, seconds: float, ranks: Sequence[int]) -> list[Any]:
        """What the store holds under ``keys``, which ``ranks`` set."""
        names, deadline = [f"{_ROOM}/{key}" for key in keys], time.monotonic() + seconds
        try:
            while not self._are_there(names, min(_SLICE, max(0.01, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    missing = [rank for rank, name in zip(ranks, names, strict=True) if not self._store.check([name])]
                    raise RankUnreachable(what, missing, seconds)
            return [json.loads(self._store.get(name)) for name in names]
        except RuntimeError as error:  # the connection is gone: rank 0 or the launcher held the store
            raise RankUnreachable(what, [0], seconds, f"the store of torch.distributed is gone ({error})") from error

    def _are_there(self, names: Sequence[str], seconds: float) -> bool:
        try:
            self._store.wait(list(names), timedelta(seconds=seconds))
        except (dist.DistStoreError, TimeoutError):
            return False
        return True

    def _set(self, key: str, value: Any) -> None:
        try:
            self._store.set(f"{_ROOM}/{key}", json.dumps(value))
        except RuntimeError as error:
            why = f"the store of torch.distributed is gone ({error})"
            raise RankUnreachable(str(value.get("what", key)), [0], self._timeout, why) from error

    def _forget(self, number: int) -> None:
        """Delete an exchange that every rank has read: all of them came to the next."""
        for key in (*range(self.world_size), "all", "read") if number >= 0 else ():
            self._store.delete_key(f"{_ROOM}/{number}/{key}")

    def _let_all_read(self) -> None:
        """On rank 0, whose process may hold the store: do not end before the others have read the last exchange."""
        deadline = time.monotonic() + min(_LONGEST_FAREWELL, self._timeout)
        try:
            while self._store.add(f"{_ROOM}/{self._number - 1}/read", 0) < self.world_size - 1:
                if time.monotonic() >= deadline:
                    return
                time.sleep(0.01)
        except RuntimeError:  # the store is gone already: nobody can read it any more
            return


_last: Ranks | None = None


def _timeout() -> float:
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else _TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"{TIMEOUT_VARIABLE}={text!r}: give a number of seconds above 0")
    return seconds
