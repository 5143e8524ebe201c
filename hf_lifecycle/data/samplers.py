"""The order of indices, drawn from a stream of its own for each epoch.

Promise: the indices of an epoch depend on the sampler, the seed and the epoch alone, also for samplers that draw from
the global generators, and drawing them moves no global generator. Each batch of indices goes out with its epoch and
its number, from which :mod:`hf_lifecycle.data.datasets` derives the random numbers that make the batch.
"""

from __future__ import annotations

import copy
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice, repeat
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hf_lifecycle.copies import keep_out, let_in
from hf_lifecycle.data.generators import OwnedGenerators
from hf_lifecycle.data.object_states import StateRecorder
from hf_lifecycle.data.standing_in import StandIn
from hf_lifecycle.data.streams import HeldStream

__all__ = ["Ticket", "TicketSampler", "drawing_sampler", "seedable"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """An index, or a batch of them, with the epoch and the number of the batch within it."""

    epoch: int
    number: int
    index: Any

    @property
    def place(self) -> tuple[int, int, int]:
        """The epoch, no worker, since workers share one numbering, and the number."""
        return self.epoch, 0, self.number


_HOST = "transformers.trainer"
_SEEDABLE = "accelerate.data_loader.SeedableRandomSampler"
_DRAWS_AT_ITS_START = frozenset(
    f"{kind.__module__}.{kind.__qualname__}"
    for kind in (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)
) | {_SEEDABLE, "transformers.trainer_pt_utils.LengthGroupedSampler"}
_DRAWS_NOTHING_ITSELF = frozenset(
    {f"{BatchSampler.__module__}.{BatchSampler.__qualname__}", "accelerate.data_loader.BatchSamplerShard"}
)


def _name(sampler: Any) -> str:
    return f"{type(sampler).__module__}.{type(sampler).__qualname__}"


def drawing_sampler(sampler: Any) -> Any:
    """The sampler inside batch samplers that draw nothing themselves."""
    while _name(sampler) in _DRAWS_NOTHING_ITSELF:
        inner = getattr(sampler, "batch_sampler", None)
        sampler = sampler.sampler if inner is None else inner
    return sampler


def _draws_only_at_its_start(sampler: Any) -> bool:
    """Whether all random numbers are drawn by the first index, so that the rest needs no stream around it."""
    return _name(drawing_sampler(sampler)) in _DRAWS_AT_ITS_START


def seedable(sampler: Any) -> Any | None:
    """The sampler inside whose ``initial_seed`` is the torch seed of the moment it was made, if there is such a one."""
    drawing = drawing_sampler(sampler)
    return drawing if _name(drawing) == _SEEDABLE else None


_LIST_ITERATOR: Any = type(iter([]))


def _batches_after(batches: BatchSampler, unseen: int) -> Iterator[list[int]]:
    """The batches but for the first ``unseen``, which are not made."""
    indices = iter(batches.sampler)
    _advance(indices, unseen * batches.batch_size)
    return iter(BatchSampler(_Rest(indices), batches.batch_size, batches.drop_last))


def _advance(indices: Iterator[int], count: int) -> None:
    """Leave out the next ``count`` of an order. One that is a list within generators is not gone through for that."""
    if next(indices, None) is None:  # the first draws them all
        return
    inner: Any = indices
    while isinstance(inner, GeneratorType) and inner.gi_yieldfrom is not None:
        inner = inner.gi_yieldfrom
    left = count - 1
    if type(inner) is _LIST_ITERATOR and inner.__length_hint__() >= left:
        inner.__setstate__(inner.__reduce__()[2] + left)
    else:
        deque(islice(indices, left), maxlen=0)


class _Rest(Sampler[int]):
    """What is left of an iteration."""

    def __init__(self, indices: Iterator[int]) -> None:
        self._indices = indices

    def __iter__(self) -> Iterator[int]:
        return self._indices


class TicketSampler(StandIn, Sampler[Any]):
    """A sampler or batch sampler run under its own stream. Attributes and class are those of the sampler inside.

    Attributes:
        order_seed: What :func:`seedable` gives has this ``initial_seed`` while it draws; None: its own.
        skip: How many indices the next iteration leaves out at its start; back to 0 once it has begun.
        passed_over: How many items of the next iteration its reader throws away unseen, of which it gets as many empty
            tickets first; back to 0 once it has begun.
        at_start: Called when the next iteration has begun.
        is_passed_by: Whether Trainer tells the sampler inside no epoch; of a resumed one, from whose loader accelerate
            has made another, it would.
    """

    _OWN = frozenset(
        {
            "inner",
            "seed",
            "current_epoch",
            "closed",
            "order_seed",
            "skip",
            "passed_over",
            "at_start",
            "recorder",
            "is_passed_by",
        }
        | {"_generator_is_ours", "_owned"}
    )

    def __init__(self, sampler: Any, seed: int) -> None:
        self.inner = sampler
        self.seed = seed
        self.current_epoch = 0
        self.closed = False  # set where a run has ended and nothing may be trained on any more
        self.order_seed: int | None = None
        self.skip = 0
        self.passed_over = 0
        self.at_start: Callable[[], None] | None = None
        self.is_passed_by = False
        self.recorder: StateRecorder | None = None  # of objects that keep a state
        self._generator_is_ours = False
        self._owned = OwnedGenerators(sampler=sampler)

    def __getattr__(self, name: str) -> Any:
        if name == "set_epoch" and self.is_passed_by and sys._getframe(1).f_globals.get("__name__") == _HOST:
            return lambda epoch: None  # noqa: ARG005
        return super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.inner)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return copy.copy, (self.inner,)  # to a worker, too

    def __iter__(self) -> Iterator[Ticket]:
        if not self.passed_over:
            return self._tickets()
        # Who passes over them takes each, a million in a large epoch: these come without a generator in between.
        return chain(repeat(Ticket(self.current_epoch, -1, None), self.passed_over), self._tickets())

    def _tickets(self) -> Iterator[Ticket]:
        """The tickets of an epoch but for those that are skipped."""
        if self.closed:
            return
        epoch, skip, self.skip, self.passed_over = self.current_epoch, self.skip, 0, 0
        at_start, self.at_start = self.at_start, None
        if at_start is not None:
            at_start()
        unseen = skip if self._has_a_short_cut() else 0
        # Invariant: the rank is no part of this key; every rank must see the same global order.
        stream = HeldStream((self.seed, "sampler", epoch))
        number = unseen
        self._is_drawn(epoch, number)
        with stream, self._with_order_seed():
            self._owned.begin_epoch(epoch)
            indices = iter(self.inner) if not unseen else _batches_after(self.inner, unseen)
            index = next(indices, stream)
        held = not _draws_only_at_its_start(self.inner)
        while index is not stream:
            if number >= skip:
                yield Ticket(epoch, number, index)
            number += 1
            self._is_drawn(epoch, number)
            if held:
                with stream:
                    index = next(indices, stream)
            else:
                index = next(indices, stream)

    def _is_drawn(self, epoch: int, number: int) -> None:
        if self.recorder is not None:
            self.recorder.before(epoch, number)

    def _has_a_short_cut(self) -> bool:
        """Whether batches need not be made to be skipped: plain ones of an order that is drawn at its start."""
        return type(self.inner) is BatchSampler and _draws_only_at_its_start(self.inner)

    def fix_order(self, order: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Let the order depend on ``order`` and the epoch alone; on the sampler as it is now, where that is None.

        Returns:
            What another process, or another rank, needs to have the same order: plain values.
        """
        inner, drawing = seedable(self.inner), drawing_sampler(self.inner)
        if getattr(drawing, "generator", 0) is None:
            # As accelerate does where there are several processes, so that the order does not depend on their number.
            drawing.generator = torch.Generator().manual_seed(self.seed & 0x7FFF_FFFF_FFFF_FFFF)
            self._generator_is_ours = True
            keep_out(drawing, _forget_generator)
        if order is not None:
            self.order_seed = order["seed"]
        elif inner is not None:
            self.order_seed = int(inner.initial_seed)
        generators = self._owned.start_from(None if order is None else order["generators"])
        return {"seed": self.order_seed, "generators": generators}

    def release(self) -> None:
        """Take back what :meth:`fix_order` gave the sampler inside."""
        if self._generator_is_ours:
            let_in(drawing_sampler(self.inner), _forget_generator)
            drawing_sampler(self.inner).generator = None
            self._generator_is_ours = False

    @contextmanager
    def _with_order_seed(self) -> Iterator[None]:
        inner = seedable(self.inner)
        if inner is None or self.order_seed is None:
            yield
            return
        own, inner.initial_seed = inner.initial_seed, self.order_seed
        try:
            yield
        finally:
            inner.initial_seed = own


def _forget_generator(attributes: dict[str, Any]) -> None:
    if "generator" in attributes:
        attributes["generator"] = None
