"""Iterable datasets: whether the state of one says exactly where it is, and what one reads ahead in threads.

Promise: what :func:`reliance` lets through gives, from a state taken after an example, the examples that would have
come. Of ``datasets`` only what was tried in every position, with and without workers, is let through; a shuffle buffer
is not, since its content is not part of the state. A dataset of the user's own is taken at its word, as long as nothing
draws random numbers while it reads.

``datasets.interleave_datasets`` and the like read ahead, with one thread for each source. Promise: where the threads
answer through futures that iterators hold, none of them runs once :meth:`ReadingAhead.settle` has returned. So what
they draw from the global generators is drawn within the batch in which it was asked for, and nothing of it depends on
timing, as long as one thread draws. Other threads cannot be waited for; they are only noticed, and not where they have
ended before the first item is given.
"""

from __future__ import annotations

import gc
import importlib.metadata
import inspect
import itertools
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from packaging.version import Version
from torch.utils.data import get_worker_info

from hf_lifecycle.data.generators import find_generators
from hf_lifecycle.data.objects import Unreadable, read_state
from hf_lifecycle.data.stream_position import After

__all__ = ["ReadingAhead", "Reliance", "iterate_from", "reliance", "state_of"]

_HUB = "datasets.iterable_dataset"
_SINCE = "5.2"  # with 4.8.5, a filtered stream that is resumed gives examples twice
# Nodes of a stream of ``datasets`` whose state was compared in every position (tests/data/test_stream_position.py).
_EXACT = frozenset(
    """
    ExamplesIterable ArrowExamplesIterable RebatchedArrowExamplesIterable FormattedExamplesIterable
    SelectColumnsIterable MappedExamplesIterable FilteredExamplesIterable
    SkipExamplesIterable TakeExamplesIterable RepeatExamplesIterable InterleavedShardsExamplesIterable
    CyclingMultiSourcesExamplesIterable RandomlyCyclingMultiSourcesExamplesIterable
    VerticallyConcatenatedMultiSourcesExamplesIterable
""".split()  # noqa: SIM905
)
# In a worker, datasets loads the state of its own shards into the whole first, which has other lists than that.
_EXACT_WITHOUT_WORKERS = frozenset(
    {"InterleavedShardsExamplesIterable", "VerticallyConcatenatedMultiSourcesExamplesIterable"}
)
_FUNCTIONS = ("function", "generate_examples_fn")
_END = object()


@dataclass(frozen=True, slots=True)
class Reliance:
    """How far the state of a dataset can be relied on.

    Attributes:
        reason: Why it cannot be at all; None: it can.
        unless_drawn: It can only as long as nothing draws random numbers while examples are read, because reading is
            partly repeated, or because nobody knows what the numbers were used for.
    """

    reason: str | None
    unless_drawn: bool = False


def _is_hub(dataset: Any) -> bool:
    return type(dataset).__module__ == _HUB


def _nodes(dataset: Any) -> Iterator[Any]:
    todo: list[Any] = [getattr(dataset, "_ex_iterable", None)]
    while todo:
        node = todo.pop()
        yield node
        todo += [node.ex_iterable] if hasattr(node, "ex_iterable") else list(getattr(node, "ex_iterables", ()))


def _obstacle(node: Any, workers: int) -> str | None:
    kind = type(node).__name__
    if kind == "BufferShuffledExamplesIterable":
        if node.buffer_size <= 1:  # which shuffles whole shards only
            return None
        return "the content of its shuffle buffer is not part of its state"
    if workers and kind in _EXACT_WITHOUT_WORKERS:
        return f"datasets cannot load the state of its {kind} in a worker"
    if kind not in _EXACT or not type(node).__module__.startswith("datasets."):
        return f"whether the state of its {kind} is exact is not known"
    if inspect.iscoroutinefunction(getattr(node, "function", None)):
        return "it maps with an async function"
    if getattr(getattr(node, "formatting", None), "is_table", False):
        return "it maps whole tables"
    for name in _FUNCTIONS:
        owned = find_generators(getattr(node, name, None), f"its {name}", make=False)
        if owned:
            return f"{', '.join(owned)} keeps state from one example to the next"
    return None


def _repeats_reading(node: Any) -> bool:
    # What several sources are mixed from is read ahead, and read again from there.
    kind = type(node).__name__
    is_mixed = "CyclingMultiSources" in kind or kind == "InterleavedShardsExamplesIterable"
    return is_mixed or kind == "ExamplesIterable" or bool(getattr(node, "batched", False))


def reliance(dataset: Any, workers: int) -> Reliance:
    """How far the state of ``dataset`` says where it is.

    Args:
        workers: By how many worker processes; 0: by none.
    """
    if not (callable(getattr(dataset, "state_dict", None)) and callable(getattr(dataset, "load_state_dict", None))):
        return Reliance(f"a {type(dataset).__qualname__} has no state_dict() and load_state_dict()")
    if not _is_hub(dataset):
        state = state_of(dataset)
        return Reliance(state if isinstance(state, str) else None, unless_drawn=True)
    version = importlib.metadata.version("datasets")
    if Version(version) < Version(_SINCE):
        return Reliance(f"not every state of datasets {version} is exact; upgrade to {_SINCE} or newer")
    nodes = list(_nodes(dataset))
    reason = next((found for node in nodes if (found := _obstacle(node, workers)) is not None), None)
    return Reliance(reason, unless_drawn=any(map(_repeats_reading, nodes)))


def state_of(dataset: Any) -> After | str:
    """The state after the example that ``dataset`` gave last, which nothing changes later; or why there is none."""
    if _is_hub(dataset):  # which copies it itself
        return After(dataset.state_dict())
    state = read_state(dataset)
    return state.reason if isinstance(state, Unreadable) else After(state)


def iterate_from(dataset: Any, state: Any) -> Iterator[Any]:
    """The examples that follow on ``state``, in this pass alone."""
    dataset.load_state_dict(state)
    items = iter(dataset)
    first = next(items, _END)
    if _is_hub(dataset):  # which would begin every pass of the same epoch there, as long as it lives
        dataset.load_state_dict({})
    if first is not _END:
        yield first
        yield from items


_HOLDERS = (types.GeneratorType, types.FrameType, enumerate, map, filter, zip, itertools.islice, itertools.chain)
# What the names of such threads begin with; this package has its own, for saves, the mirror and other ranks.
_DRAW_NOTHING = ("datasets_decode", "fsspec", "asyncio", "pydevd", "hf_lifecycle")


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
