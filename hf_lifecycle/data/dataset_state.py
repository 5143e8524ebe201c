"""Whether the state of an iterable dataset says exactly where it is, and how to continue from such a state.

Promise: what :func:`reliance` lets through gives, from a state taken after an example, the examples that would have
come. Of ``datasets`` only what was tried in every position, with and without workers, is let through; a shuffle buffer
is not, since its content is not part of the state. A dataset of the user's own is taken at its word, as long as nothing
draws random numbers while it reads.
"""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from packaging.version import Version

from hf_lifecycle.data.generators import find_generators
from hf_lifecycle.data.objects import Unreadable, read_state
from hf_lifecycle.data.stream_position import After

__all__ = ["Reliance", "iterate_from", "reliance", "state_of"]

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
