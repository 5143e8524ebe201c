"""What a stream reads ahead in threads, such as ``datasets.interleave_datasets``: one thread for each source.

Promise: where the threads answer through futures that iterators hold, none of them runs once :meth:`settle` has
returned. So what they draw from the global generators is drawn within the batch in which it was asked for, and nothing
of it depends on timing, as long as one thread draws. Other threads cannot be waited for; they are only noticed, and not
where they have ended before the first item is given.
"""

from __future__ import annotations

import gc
import itertools
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from typing import Any

from torch.utils.data import get_worker_info

__all__ = ["ReadingAhead"]

_HOLDERS = (types.GeneratorType, types.FrameType, enumerate, map, filter, zip, itertools.islice, itertools.chain)
_DRAW_NOTHING = ("datasets_decode", "fsspec", "asyncio", "pydevd")  # what the names of such threads begin with


class ReadingAhead:
    """The threads of one pass over a stream; a copy of it is None.

    Args:
        dataset: What is iterated.

    Attributes:
        after_each_item: Whether the threads are waited for after each item: until the first batch is complete, and
            where random numbers are drawn. Otherwise sources are read at the same time within a batch.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._items: weakref.ref[Any] | None = None
        self._threads: set[threading.Thread] | None = set(threading.enumerate())
        self._has_futures = self._has_others = False
        self.after_each_item = True

    def __reduce__(self) -> Any:
        return type(None), ()

    def of(self, items: Iterator[Any]) -> Iterator[Any]:
        """Follow ``items``, the iterator of this pass, which is returned."""
        self._items = weakref.ref(items) if isinstance(items, types.GeneratorType) else None
        return items

    @property
    def in_threads(self) -> bool:
        """Whether threads that this pass has started read."""
        return self._has_futures or self._has_others

    def settle(self) -> None:
        """Wait until no thread that reads for the iterator runs."""
        items = self._items and self._items()
        while futures := list(_futures(items)):
            self._has_futures = True
            if not wait(futures, timeout=0).not_done:
                break
            wait(futures)  # and look again: what they read may read ahead itself
        if self._threads is not None:  # after the first item
            started = set(threading.enumerate()) - self._threads
            readers = [one for one in started if not type(one).__module__.startswith("tqdm.")]
            self._has_others = any(not one.name.startswith(_DRAW_NOTHING) for one in readers)
            self._threads = None

    def races(self) -> bool:
        """Whether numbers that are drawn while items are read may be drawn by threads that run at the same time."""
        if not self._has_futures:
            return self._has_others
        dataset = self._dataset
        while type(dataset).__module__.startswith("accelerate."):  # which shards it
            dataset = dataset.dataset
        if type(dataset).__module__ != "datasets.iterable_dataset":
            return True
        return _threads_with_functions(dataset._ex_iterable) > 1


def _threads_with_functions(node: Any) -> int:
    """In how many threads, the one that iterates included, functions of the user's run below a node of ``datasets``."""
    here = False
    while True:
        here = here or hasattr(node, "function") or hasattr(node, "generate_examples_fn")
        if type(node).__name__ == "InterleavedShardsExamplesIterable":  # a thread for each shard of this process
            info = get_worker_info()
            shards: int = -(-node.ex_iterable.num_shards // (info.num_workers if info is not None else 1))
            threads: int = min(shards, node.max_input_shards)
            return here + threads * _threads_with_functions(node.ex_iterable)
        if not hasattr(node, "ex_iterable"):
            return here + sum(map(_threads_with_functions, getattr(node, "ex_iterables", ())))
        node = node.ex_iterable


def _futures(iterator: Any) -> Iterator[Future[Any]]:
    """The futures held by an iterator, or by those from which it takes what it gives."""
    seen: set[int] = set()
    todo = [iterator]
    while todo:
        for one in gc.get_referents(todo.pop()):  # unlike f_locals, with the iterators of running for loops
            if id(one) in seen:
                continue
            if isinstance(one, Future):
                yield one
            elif isinstance(one, _HOLDERS) or (
                isinstance(one, (list, tuple, deque)) and one and isinstance(one[0], (Future, types.GeneratorType))
            ):
                seen.add(id(one))
                todo.append(one)
