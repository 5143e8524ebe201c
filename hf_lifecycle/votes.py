"""A number that any rank may name at a step, and that all of them know one step later, so that no step waits for it.

Promise: at the same call every rank gets the same answer: the largest number named in the call before. So whatever the
answer decides is decided on all ranks at the same step, also where they run ahead of their devices. It is a reduction
on a group of its own, on the CPU, started at one step and read at the next; on one process it costs nothing.

Not promised: an exchange of anything else; that is :mod:`hf_lifecycle.ranks`'. All ranks make the same calls.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from hf_lifecycle.errors import RankUnreachable
from hf_lifecycle.ranks import Ranks

__all__ = ["Votes"]

_PAUSE = 0.0005  # seconds between two looks; waiting in one call would keep a signal waiting


class Votes:
    """The votes of one training. Make it at the same place on every rank.

    Args:
        what: What they are about, for the error.
        timeout: Seconds to wait for another rank. Default: that of :class:`~hf_lifecycle.ranks.Ranks`.
    """

    def __init__(self, what: str, *, timeout: float | None = None) -> None:
        ranks = Ranks.current()
        self._what = what
        self._others = [rank for rank in range(ranks.world_size) if rank != ranks.rank]
        self._timeout = ranks._timeout if timeout is None else timeout
        self._group = _group(self._timeout) if self._others else None
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def cast(self, number: int, *, wait: bool = False) -> int:
        """Name a number, 0 for none.

        Args:
            number: What this rank names; at least 0.
            wait: Wait for what the others name now; else what they named at the call before is the answer.

        Raises:
            RankUnreachable: Another rank is gone, or did not come in time.
        """
        if self._group is None:
            return number
        before = self._read()
        tensor = torch.tensor([number], dtype=torch.int32)
        try:
            work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        except RuntimeError as error:
            raise RankUnreachable(self._what, self._others, self._timeout, str(error)) from error
        self._under_way = work, tensor
        return max(before, self._read()) if wait else before

    def _read(self) -> int:
        if self._under_way is None:
            return 0
        (work, tensor), self._under_way = self._under_way, None
        deadline = time.monotonic() + self._timeout
        while not work.is_completed():
            if time.monotonic() > deadline:
                raise RankUnreachable(self._what, self._others, self._timeout)
            time.sleep(_PAUSE)
        try:
            work.wait()
        except RuntimeError as error:
            raise RankUnreachable(self._what, self._others, self._timeout, str(error)) from error
        return int(tensor.item())


_known: tuple[Any, Any] | None = None  # the default group, and ours beside it


def _group(timeout: float) -> Any:
    global _known
    default = dist.group.WORLD
    # Invariant: made on all ranks or on none, since all ask for it at the same places.
    if _known is None or _known[0] is not default:
        _known = default, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
    return _known[1]
