"""Long work in C, such as digests of many gigabytes, on several cores of this process while its caller waits.

Promise: no thread outlives the call, whatever ends it; what is told of progress is told by the caller's own thread, as
bars in notebooks want it. Where no thread can be started, the caller does all of it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TypeVar

__all__ = ["on_cores"]

_MOST = 4  # threads: with so many, memory or the disk is what work waits for
_WORTH = 64 << 20  # bytes, below which threads take longer to start than they save
_LOOK = 0.1  # seconds between two reports of progress

Advance = Callable[[int], None]
T = TypeVar("T")
R = TypeVar("R")


class _GivenUp(Exception):
    """The caller waits no longer."""


def on_cores(
    work: Callable[[T, Advance], R], items: Sequence[T], sizes: Sequence[int], advance: Advance = lambda _: None
) -> list[R]:
    """What ``work`` makes of each item, in their order; the largest begin first.

    Args:
        work: Releases the interpreter's lock for most of its time. It tells its second argument of every piece that it
            has done, and lets through what that raises.
        sizes: Bytes of each item.
        advance: What is told of the pieces.

    Raises:
        Exception: Of what ``work`` raised, one.
    """
    threads = min(_MOST, len(items), _cores())
    if threads < 2 or sum(sizes) < _WORTH:
        return [work(one, advance) for one in items]
    order = iter(sorted(range(len(items)), key=lambda place: -sizes[place]))
    made: dict[int, R] = {}
    pieces: deque[int] = deque()
    is_over = threading.Event()

    def tell(size: int) -> None:
        if is_over.is_set():
            raise _GivenUp
        pieces.append(size)

    def run() -> None:
        while not is_over.is_set() and (place := next(order, None)) is not None:
            made[place] = work(items[place], tell)

    with ThreadPoolExecutor(threads, thread_name_prefix="hf_lifecycle-cores") as pool:
        try:
            running = _started(pool, run, threads)
            if not running:
                return [work(one, advance) for one in items]
            while running:
                done, running = wait(running, _LOOK, FIRST_EXCEPTION)
                for one in done:
                    one.result()
                while pieces:
                    advance(pieces.popleft())
        finally:
            is_over.set()
    return [made[place] for place in range(len(items))]


def _started(pool: ThreadPoolExecutor, run: Callable[[], None], threads: int) -> set[Future[None]]:
    started = set()
    with suppress(RuntimeError):  # an interpreter that ends admits no thread, nor does a machine that has too many
        for _ in range(threads):
            started.add(pool.submit(run))
    return started


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
