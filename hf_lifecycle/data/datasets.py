"""Datasets whose batches, collation included, are made under random numbers that their key alone decides.

Promise: the same epoch and batch number give the same batch, whoever makes it: the main process, a worker, a
persistent worker, after any number of breaks. Code that seeds itself as torch advises, by ``get_worker_info().seed`` or
``torch.initial_seed()``, finds what the run's seed, the epoch, the worker and the rank say, and nothing else.
Attributes, length and direct indexing are those of the dataset inside. Data that is read from a source that changes, or
drawn from the operating system, is out of reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from hf_lifecycle.data.batch_marks import mark_of
from hf_lifecycle.data.dataset_state import ReadingAhead, iterate_from, state_of
from hf_lifecycle.data.generators import OwnedGenerators
from hf_lifecycle.data.object_states import StateRecorder
from hf_lifecycle.data.samplers import Ticket
from hf_lifecycle.data.standing_in import Made, StandIn
from hf_lifecycle.data.stream_position import After, Stamped, Start, note
from hf_lifecycle.data.streams import Key, KeyedScope, seed_host, worker_seed

__all__ = ["IterableStream", "MapStream", "Stamps", "WorkerStart"]

Collate = Callable[[Any], Any]
_NEVER = -1
_ENDED = After(None, ended=True)
_DREW = "random numbers were drawn while examples were read, and its state does not contain at which one"


class _Stream(StandIn):
    """What both kinds share: the dataset inside, the epoch in shared memory, and the way a batch is made.

    Whoever reads or sets another attribute than those in ``_OWN`` gets to the dataset inside: a ``worker_init_fn`` that
    shards it through ``get_worker_info().dataset``, a callback that makes it harder from epoch to epoch.
    """

    _OWN = frozenset(
        {"inner", "inner_collate", "run_epoch", "run_has_ended", "stamps", "recorder", "marks"}
        | {"_seed", "_rank", "_share", "_shared", "_told", "_scope", "_owned", "_batch", "_drew", "_entered"}
        | {"_initial_seed", "_races", "_ahead"}
    )

    def __init__(self, dataset: Any, collate_fn: Collate, seed: int, rank: int) -> None:
        self.inner = dataset
        self.inner_collate = collate_fn
        self._seed = seed
        self._rank = rank
        self._share: tuple[int, int] | None = None  # of each round of batches: how many there are, and which is ours
        # Invariant: shared memory, so that persistent workers see an epoch that began after they did.
        # [the epoch of the run, the epoch the dataset was last told or _NEVER]
        self._shared = torch.tensor([0, _NEVER], dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self._told = _NEVER
        self._scope = KeyedScope()
        self._initial_seed: tuple[int, int | None, int] = (_NEVER, None, 0)  # of which epoch and worker, and the seed
        self._owned = OwnedGenerators(dataset=dataset, collate_fn=collate_fn)
        self.recorder: StateRecorder | None = None  # of objects that keep a state
        self.marks: int | None = None  # the token of the BatchMarks that are told of each batch
        self._races = False  # whether threads draw while others do

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def run_epoch(self) -> int:
        return int(self._shared[0])

    @run_epoch.setter
    def run_epoch(self, epoch: int) -> None:
        self._shared[0] = epoch

    def set_epoch(self, epoch: int) -> None:  # noqa: ARG002
        """Tell the dataset inside, where it wants to know, and every worker.

        The epoch told is the run's own: a Trainer that resumes a stream counts its epochs from 0 again.
        """
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(self.run_epoch)
            self._shared[1] = self._told = self.run_epoch

    def _catch_up(self) -> None:
        """In a worker that began before this epoch: tell its copy of the dataset what the main process told its own."""
        told = int(self._shared[1])
        if told != self._told:
            self.inner.set_epoch(told)
            self._told = told

    def owned_generators(self) -> list[str]:
        """The generators of the user's that are seeded with every batch, by path."""
        return self._owned.names()

    def _seed_here(self, epoch: int) -> int:
        """What torch calls the seed of this process in ``epoch``; a worker's info is made to say it too."""
        info = get_worker_info()
        worker = None if info is None else info.id
        if self._initial_seed[:2] != (epoch, worker):
            self._initial_seed = epoch, worker, worker_seed(self._seed, epoch, worker or 0, self._rank)
            if info is not None:
                object.__setattr__(info, "seed", self._initial_seed[2])  # torch lets nobody set it
        return self._initial_seed[2]

    def _marked(self, sent: Any, batch: Any, epoch: int, worker: int, number: int) -> Any:
        """What is sent instead of ``sent``, so that the mark of the batch is noted where it arrives."""
        if self.marks is None:
            return sent
        stamp = self.marks, epoch, worker, number, mark_of(batch), self._races
        if get_worker_info() is None:
            note(*stamp)
        return sent if get_worker_info() is None else Stamped(sent, *stamp)

    def share(self, number_of_ranks: int, rank: int) -> None:
        """Let a batch be made by its number among those of all ranks, as if one process made them all."""
        self._share = number_of_ranks, rank

    def _open(self, key: Key, epoch: int) -> int:
        here = self._seed_here(epoch)
        if self._share is None:
            return self._scope.open((self._seed, *key, self._rank), here)
        (*place, number), (of, ours) = key, self._share
        return self._scope.open((self._seed, *place, int(number) * of + ours, 0), worker_seed(self._seed, epoch, 0, 0))


class WorkerStart:
    """The ``worker_init_fn`` of a loader under streams: seeds a worker, however many were started before it.

    Args:
        persistent: Whether workers live on: then they are those of the run's first epoch, in which they would have been
            started in a run without a break.
    """

    def __init__(self, stream: _Stream, init: Callable[[int], Any] | None, *, persistent: bool) -> None:
        self.stream = stream
        self.init = init
        self.persistent = persistent

    def __call__(self, worker: int) -> None:
        seed_host(self.stream._seed_here(0 if self.persistent else self.stream.run_epoch))
        if self.init is not None:
            self.init(worker)


class MapStream(_Stream, Dataset[Any]):
    """A map-style dataset that answers a :class:`Ticket` with the finished batch."""

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, Ticket):
            return self.inner[index]
        return self._make(index, lambda: self.inner[index.index])

    def __getitems__(self, indices: Any) -> Any:
        if not isinstance(indices, Ticket):
            return self._items(indices)
        return self._make(indices, lambda: self._items(indices.index))

    def _items(self, indices: Any) -> Any:
        many = getattr(self.inner, "__getitems__", None)
        return many(indices) if callable(many) else [self.inner[index] for index in indices]

    @staticmethod
    def run_collate(batch: Any) -> Any:
        """It was collated as it was made."""
        return batch.batch if type(batch) is Made else batch

    def _make(self, ticket: Ticket, fetch: Callable[[], Any]) -> Any:
        in_worker = get_worker_info() is not None
        if in_worker:
            self._catch_up()
        if self.recorder is not None:
            self.recorder.before(ticket.epoch, ticket.number)
        seed = self._open(("batch", ticket.epoch, ticket.number), ticket.epoch)
        try:
            self._owned.begin_batch(seed)
            items = fetch()
            sent = batch = self.inner_collate(items)
        finally:
            self._scope.close()
        if self.recorder is not None and in_worker:
            sent = self.recorder.after(batch, ticket.epoch, ticket.number)
        return Made.of(items, self._marked(sent, batch, *ticket.place))


@dataclass(frozen=True, slots=True)
class Stamps:
    """What is noted with every batch of a stream: the state of its dataset.

    Attributes:
        token: Of the :class:`~hf_lifecycle.data.stream_position.StreamPosition` that is told.
        unless_drawn: The state is of no use once something was drawn while examples were read.
    """

    token: int
    unless_drawn: bool


class IterableStream(_Stream, IterableDataset[Any]):
    """An iterable dataset; a batch begins with its first item and ends with :meth:`run_collate`, in one scope."""

    def __init__(self, dataset: Any, collate_fn: Collate, seed: int, rank: int) -> None:
        super().__init__(dataset, collate_fn, seed, rank)
        self.run_has_ended = False  # set where a run has ended and nothing may be trained on any more
        self.stamps: Stamps | None = None
        self._batch = (0, 0, 0)  # epoch, worker, number
        self._drew = False
        self._entered: tuple[int, list[Start]] | None = None
        self._ahead: ReadingAhead | None = None  # of the pass that was begun last

    def enter(self, epoch: int, starts: list[Start]) -> None:
        """Let the pass of ``epoch`` begin, in each process that reads, where ``starts`` say."""
        self._entered = epoch, starts

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        if worker is not None:
            self._catch_up()
        index, epoch = 0 if worker is None else worker.id, self.run_epoch
        entered = self._entered is not None and self._entered[0] == epoch
        return _StreamIterator(self, epoch, index, self._entered[1][index] if entered and self._entered else Start(0))

    def _start(self, epoch: int, state: Any) -> Iterator[Any]:
        """A new pass over the dataset inside, from its beginning or from ``state``."""
        self._owned.begin_epoch(epoch)
        self._ahead = ReadingAhead(self.inner)
        return self._ahead.of(iter(self.inner) if state is None else iterate_from(self.inner, state))

    def _settle(self) -> None:
        """After an item: let no thread draw any longer, where one may."""
        if self._ahead is not None and self._ahead.after_each_item:
            self._ahead.settle()

    def _begin(self, epoch: int, worker: int, number: int) -> bool:
        """Open the scope of a batch unless it is open; whether a batch began."""
        if self._scope.is_open:
            return False
        self._batch = epoch, worker, number
        if self.recorder is not None:
            self.recorder.before(epoch, number)
        self._open(("stream", epoch, worker, number), epoch)
        return True

    def _leave(self) -> None:
        """Close the scope: the items ended, or an error came."""
        self._watch()
        self._scope.close()

    def _watch(self) -> None:
        """Notice whether reading drew random numbers, where that matters."""
        matters = self.stamps is not None and self.stamps.unless_drawn and not self._drew
        ahead = self._ahead
        if ahead is not None:
            ahead.settle()
            matters = matters or (ahead.in_threads and not self._races)
        drew = matters and not self._scope.is_untouched()
        self._drew = self._drew or drew
        if ahead is not None:
            ahead.after_each_item = ahead.in_threads and self._drew
            self._races = self._races or (drew and ahead.in_threads and ahead.races())

    def run_collate(self, items: Any) -> Any:
        """The loader's collation: that of the user, in the scope of the batch."""
        ended = not self._scope.is_open
        if ended:  # the last items of a stream: the end of the stream closed the scope
            self._open(("tail", "stream", *self._batch), self._batch[0])
        else:
            self._watch()
        try:
            batch = self.inner_collate(items)
        finally:
            self._scope.close()
        sent = batch if self.stamps is None else self._stamped(batch, self.stamps.token, ended)
        return self._marked(sent, batch, *self._batch)

    def _stamped(self, batch: Any, token: int, ended: bool) -> Any:
        after: After | str = _DREW if self._drew else _ENDED if ended else state_of(self.inner)
        if get_worker_info() is not None:
            return Stamped(batch, token, *self._batch, after)
        note(token, *self._batch, after)
        return batch


class _StreamIterator:
    def __init__(self, stream: IterableStream, epoch: int, worker: int, start: Start) -> None:
        self._stream = stream
        self._epoch = epoch
        self._worker = worker
        self._number = start.number
        self._start = start
        self._items: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._stream.run_has_ended or self._start.ended:
            raise StopIteration
        self._number += self._stream._begin(self._epoch, self._worker, self._number)
        try:
            if self._items is None:
                self._items = self._stream._start(self._epoch, self._start.state)
            item = next(self._items)
            self._stream._settle()
            return item
        except BaseException:
            self._stream._leave()
            raise
