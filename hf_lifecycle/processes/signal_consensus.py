"""A number that any rank may name at a step, and that all of them know one step later, so that no step waits for it.

Promise: at the same call every rank gets the same answer: the largest number named in the call before. So whatever the
answer decides is decided on all ranks at the same step, also where they run ahead of their devices. It is a reduction
on a group of its own, on the CPU, started at one step and read at the next; on one process it costs nothing. The ranks
of that group find each other through a store that no earlier attempt has written to (see
:mod:`hf_lifecycle.processes.rank_store`): ``torch.distributed.new_group`` would read the addresses of dead processes
there.

Not promised: an exchange of anything else; that is :mod:`hf_lifecycle.processes.ranks`'. All ranks make the same calls.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_lifecycle.errors import RankUnreachable
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["SignalConsensus"]

# A group that ends with a vote under way waits for it, in the garbage collector, while it holds the interpreter.
_kept: list[Any] = []
_LOOK = 0.5  # seconds between two looks at whether another rank was interrupted
_PAUSE = 0.0005  # seconds between two looks; waiting in one call would keep a signal waiting


class SignalConsensus:
    """The votes of one training. Make it at the same place on every rank.

    Args:
        timeout: Seconds to wait for another rank. Default: that of :class:`~hf_lifecycle.processes.ranks.Ranks`.
    """

    def __init__(self, what: str, *, timeout: float | None = None) -> None:
        ranks = self._ranks = Ranks.current()
        self._what = what
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._timeout = ranks.timeout if timeout is None else timeout
        self._group = self._meet(ranks) if self._others else None
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def _meet(self, ranks: Ranks) -> Any:
        store = ranks.private_store(what=self._what)
        errors: list[RuntimeError] = []

        def meet() -> None:
            try:
                _kept.append(
                    dist.ProcessGroupGloo(store, ranks.rank, ranks.world_size, timedelta(seconds=self._timeout))
                )
            except RuntimeError as error:
                errors.append(error)

        # A constructor that waits for a rank that was interrupted would neither hear of it nor heed a signal here.
        thread = threading.Thread(target=meet, name="hf_lifecycle-meeting", daemon=True)
        thread.start()
        self._wait_until(lambda: not thread.is_alive())
        if errors:
            raise RankUnreachable(self._what, self._others, self._timeout, str(errors[0])) from errors[0]
        return _kept[-1]

    def cast(self, number: int, *, wait: bool = False) -> int:
        """Name a number, 0 for none.

        Args:
            number: What this rank names; at least 0.
            wait: Wait for what the others name now; else what they named at the call before is the answer.

        Raises:
            RankUnreachable: Another rank is gone, or did not come in time.
            RankFailed: Another rank was interrupted in an exchange.
        """
        if self._group is None:
            return number
        before = self._read()
        tensor, largest = torch.tensor([number], dtype=torch.int32), dist.AllreduceOptions()
        largest.reduceOp = dist.ReduceOp.MAX  # type: ignore[assignment]  # torch's stub knows one of its two classes
        try:
            work = self._group.allreduce([tensor], largest)
        except RuntimeError as error:
            raise RankUnreachable(self._what, self._others, self._timeout, str(error)) from error
        self._under_way = work, tensor
        return max(before, self._read()) if wait else before

    def _read(self) -> int:
        if self._under_way is None:
            return 0
        (work, tensor), self._under_way = self._under_way, None
        self._wait_until(work.is_completed)
        try:
            work.wait()
        except RuntimeError as error:
            raise RankUnreachable(self._what, self._others, self._timeout, str(error)) from error
        return int(tensor.item())

    def _wait_until(self, is_done: Callable[[], bool]) -> None:
        """Raise where another rank has withdrawn, or does not come in time."""
        began = look = time.monotonic()
        while not is_done():
            now = time.monotonic()
            if now - began > self._timeout:
                raise RankUnreachable(self._what, self._others, self._timeout)
            if now - look > _LOOK:
                look = now
                self._ranks.hear(self._what)
            time.sleep(_PAUSE)
