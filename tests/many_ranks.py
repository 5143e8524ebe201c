"""Many ranks in one process: threads that make the exchanges of ``processes/ranks.py`` through a store that counts."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.distributed import Store

from hf_lifecycle.processes.ranks import Ranks

__all__ = ["EXCHANGES", "CountingStore", "simulate"]

EXCHANGES: dict[str, Callable[[Ranks], object]] = {
    "agree": lambda ranks: _nothing(ranks),
    "gather": lambda ranks: ranks.gather(False, what="a vote"),
    "broadcast": lambda ranks: ranks.broadcast(0.25, what="a metric"),
}


def _nothing(ranks: Ranks) -> None:
    with ranks.agree(what="nothing"):
        pass


class CountingStore(Store):
    """A store in memory. It counts what each rank asks of it, on the thread that bears the rank's number."""

    def __init__(self) -> None:
        super().__init__()
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # by the thread's name
        self.looks: Counter[str] = Counter()  # of these, those that only ask whether something is there yet
        self.bytes: Counter[str] = Counter()

    def _count(self, size: int, *, is_look: bool = False) -> None:
        name = threading.current_thread().name
        (self.looks if is_look else self.requests)[name] += 1
        if not is_look:
            self.bytes[name] += size

    def clone(self) -> CountingStore:
        return self

    def set(self, key: str, value: Any) -> None:
        with self._lock:
            self._values[key] = value if isinstance(value, bytes) else str(value).encode()
            self._count(len(key) + len(self._values[key]))

    def get(self, key: str) -> bytes:
        with self._lock:
            self._count(len(key) + len(self._values[key]))
            return self._values[key]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        with self._lock:
            found = [self._values[key] for key in keys]
            self._count(sum(map(len, keys)) + sum(map(len, found)))
            return found

    def has_extended_api(self) -> bool:
        return True

    def add(self, key: str, value: int) -> int:
        with self._lock:
            now = int(self._values.get(key, b"0")) + value
            self._values[key] = str(now).encode()
            self._count(len(key) + 8, is_look=value == 0)
            return now

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            self._count(sum(map(len, keys)), is_look=True)
            return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        with self._lock:
            self._count(len(key))
            return self._values.pop(key, None) is not None

    # As torch's wrapper calls them.
    deleteKey = delete_key  # noqa: N815
    multiGet = multi_get  # noqa: N815
    hasExtendedApi = has_extended_api  # noqa: N815

    @property
    def size(self) -> int:
        """How many keys there are."""
        return len(self._values)


def simulate(world_size: int, kind: str, *, times: int = 4) -> dict[str, float]:
    """Let that many ranks make one kind of exchange. Returns what each of it costs, and the keys that are left."""
    store, seconds, failures = CountingStore(), [0.0] * world_size, []
    ready = threading.Barrier(world_size)

    def run(rank: int) -> None:
        try:
            ranks = Ranks(rank, world_size, store, timeout=3600)
            for _ in range(3):  # the first meets, and each forgets what was before
                ranks.barrier(what="beginning")
            ready.wait()
            if rank == 0:
                for counter in (store.requests, store.looks, store.bytes):
                    counter.clear()
            ready.wait()
            began = time.thread_time()
            for _ in range(times):
                EXCHANGES[kind](ranks)
            seconds[rank] = time.thread_time() - began
        except BaseException as error:  # noqa: BLE001 - it is told to the caller
            failures.append(error)
            ready.abort()

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}") for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    others = [f"rank {rank}" for rank in range(1, world_size)]
    return {
        "requests of rank 0": store.requests["rank 0"] / times,
        "bytes of rank 0": store.bytes["rank 0"] / times,
        "milliseconds of rank 0": seconds[0] * 1e3 / times,
        "requests of another": max(store.requests[name] for name in others) / times,
        "bytes of another": max(store.bytes[name] for name in others) / times,
        "looks of another": sum(store.looks[name] for name in others) / len(others) / times,
        "keys left": store.size,
    }
