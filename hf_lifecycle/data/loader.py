"""The one door through which a data loader's parts are exchanged, and restored.

Promise: a loader taken over gives batches that its key alone decides, draws nothing from the global generators, and is
given back as it was; a copy of it is one of what it was. A loader that cannot be taken over is left alone, with the
reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_lifecycle.copies import keep_out, let_in
from hf_lifecycle.data.batch_marks import BatchMarks
from hf_lifecycle.data.dataset_state import Reliance, reliance
from hf_lifecycle.data.datasets import IterableStream, MapStream, Stamps, WorkerStart
from hf_lifecycle.data.object_states import ObjectStates, TrackedObjects
from hf_lifecycle.data.objects import find_making_and_drawing
from hf_lifecycle.data.samplers import TicketSampler, seedable
from hf_lifecycle.data.standing_in import Collation
from hf_lifecycle.data.stateful_loader import STATEFUL, begin_anew, begin_anew_unless_within
from hf_lifecycle.data.stream_position import StreamPosition, repeated, starts
from hf_lifecycle.torch_internals import drops_last, forget_iterator

__all__ = ["LoaderTakeover", "leave_to_others", "obstacle", "order_seed", "take_over"]

_BEFORE = "_hf_lifecycle_before"  # on a loader taken over: its own parts by name


def _base(loader: Any) -> Any:
    """The torch loader inside what accelerate prepared. ``isinstance`` of the outer one would say DataLoader too."""
    try:
        return object.__getattribute__(loader, "base_dataloader")
    except AttributeError:
        return loader


def obstacle(loader: Any, *, keeps_position: bool = True) -> str | None:
    """Why this loader cannot be taken over, or None.

    Args:
        keeps_position: Whether a loader that keeps a position of its own, a ``StatefulDataLoader``, stays in charge of
            it. If not, it can be taken over, and :meth:`LoaderTakeover.begin_epoch` forgets its own position.
    """
    base = _base(loader)
    kind = f"{type(base).__module__}.{type(base).__qualname__}"
    if not isinstance(base, DataLoader):
        return f"the training loader is a {kind}, not a torch DataLoader: its random numbers cannot be controlled"
    if kind == STATEFUL and not keeps_position:
        return None
    if kind.startswith("torchdata."):
        return "the training loader is a StatefulDataLoader, which keeps its own position"
    if type(base).__iter__ is not DataLoader.__iter__:
        return f"the training loader is a {kind} that overrides __iter__: its random numbers cannot be controlled"
    return None


def leave_to_others(loader: Any) -> None:
    """Let each pass over a loader that others iterate, for an evaluation say, move torch's generator alike."""
    base = _base(loader)
    if f"{type(base).__module__}.{type(base).__qualname__}" == STATEFUL:
        begin_anew_unless_within(base)


def order_seed(loader: Any) -> int | None:
    """The seed of the order where accelerate took it from torch, which anyone may have seeded since; else None.

    Args:
        loader: A loader that can be taken over; :func:`obstacle` must be None.
    """
    base = _base(loader)
    inner = seedable(base.sampler if base.batch_sampler is None else base.batch_sampler)
    return None if inner is None else int(inner.initial_seed)


@dataclass(slots=True)
class LoaderTakeover:
    """A loader whose dataset, order and collation are under streams: what was prepared, and the torch loader in it.

    Attributes:
        loader: What was prepared.
        base: The torch loader in it.
        dataset: Its dataset under a stream.
        sampler: Its order under a stream; None for an iterable dataset.
        position: Where an iterable dataset is, by its own state, once :meth:`follow` was called; None where that cannot
            be relied on.
        objects: The states of its objects that keep one, once :meth:`carry` has looked for them.
    """

    loader: Any
    base: Any
    dataset: MapStream | IterableStream
    sampler: TicketSampler | None
    position: StreamPosition | None = None
    no_position: str = "its position is not tracked"
    objects: ObjectStates | None = None

    @property
    def iterable(self) -> bool:
        return isinstance(self.dataset, IterableStream)

    def begin_epoch(self, epoch: int, *, skip: int = 0, host: Callable[[int], None] | None = None) -> int:
        """From the next iteration on, batches are those of ``epoch``.

        Args:
            skip: Batches that were had before, for the next iteration alone.
            host: ``accelerate.skip_first_batches`` skips them, which skips one batch of the base loader for each. It is
                told, once the iteration has begun, how many of them come all the same, to be dropped.

        Returns:
            How many of them the iteration begins with all the same, where no host drops them. A stream has to make all
            of them again. Workers make the last few again, so that each batch comes from the worker that it comes from
            in a run without a break.
        """
        self.dataset.run_epoch = epoch
        begin_anew(self.base)
        if self.objects is not None:
            self.objects.begin(epoch)
        if self.sampler is None:
            return skip
        again = skip % self._batches_a_round() if host is None or hasattr(self.loader, "skip_batches") else 0
        self.sampler.current_epoch = epoch
        self.sampler.skip = (skip - again) * self._indices_a_batch()
        if host is None:
            return again
        self.sampler.passed_over = skip
        if self.loader is not self.base and skip > 0:
            vars(self.loader).pop("collate_fn", None)  # set there it decides nothing, but for the loader made to skip
        told = hasattr(self.loader, "set_epoch") or hasattr(self.sampler.inner, "batch_sampler")
        self.sampler.is_passed_by = skip > 0 and not told
        self.sampler.at_start = partial(host, again) if again else None
        sampler: Any = getattr(self.sampler.inner, "sampler", None)
        if self._dispatches and hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)  # accelerate tells it, but not through the batch sampler with which it skips
        return 0

    def _batches_a_round(self) -> int:
        """After so many batches it is the first worker's turn again."""
        workers = max(self.base.num_workers, 1)
        return int(workers // math.gcd(workers, self._indices_a_batch()))

    def _indices_a_batch(self) -> int:
        """How many of the base loader's batches make one: more where accelerate deals them out from one process."""
        return int(self.loader.state.num_processes) if self._dispatches and not self.loader.split_batches else 1

    @property
    def _dispatches(self) -> bool:
        return hasattr(self.loader, "slice_fn")

    @property
    def completes_from_first_batch(self) -> bool:
        """Whether an epoch's last batch is filled up from its first, which one entered in its middle has not.

        accelerate does so where one process deals out what the others cannot share evenly.
        """
        if self.sampler is None or self._indices_a_batch() == 1 or drops_last(self.loader):
            return False
        examples = len(self.dataset)
        return bool(examples % (self._indices_a_batch() * (self.sampler.batch_size or 1)))

    def fix_order(self, order: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """As :meth:`TicketSampler.fix_order`; None where there is no order, in a stream."""
        return None if self.sampler is None else self.sampler.fix_order(order)

    def carry(self, given: Mapping[str, Any], refusal: Callable[[Any], str | None]) -> dict[str, str]:
        """Note the states of objects that take part in making batches, each with its batch.

        Args:
            given: Objects that the user named, by name; those that do not take part are left alone.
            refusal: Why a state cannot be kept, or None.

        Returns:
            Objects that have a state which cannot be kept, with the reasons.
        """
        making, drawing, refused = find_making_and_drawing(self.dataset, self.sampler, given, refusal)
        workers, persistent = self.base.num_workers, bool(self.base.persistent_workers)
        self.objects = ObjectStates(
            TrackedObjects(making, workers=workers, persistent=persistent, replays=self.iterable),
            TrackedObjects(drawing, workers=0, persistent=False, replays=True),
            per_batch=self._indices_a_batch(),
            marks=BatchMarks(workers if self.iterable else 0),
        )
        self.dataset.marks = self.objects.marks.token
        self.dataset.recorder = self.objects.making.recorder if making else None
        if self.sampler is not None:
            self.sampler.recorder = self.objects.drawing.recorder if drawing else None
        return refused

    def follow(self) -> None:
        """Note the state of an iterable dataset with every batch, from the next iteration on.

        Whoever calls this tells :attr:`position` of every epoch that begins and of every batch that is trained on.
        """
        trust = _reliance(self.loader, self.base, self.dataset)
        beside = [] if self.objects is None else self.objects.making.beside(self.dataset.inner)
        if trust.reason is None and beside:
            trust = Reliance(f"{', '.join(beside)} keeps state outside the dataset")
        if trust.reason is not None:
            self.no_position = trust.reason
            return
        assert isinstance(self.dataset, IterableStream)
        self.position = StreamPosition(self.base.num_workers)
        self.dataset.stamps = Stamps(self.position.token, trust.unless_drawn)

    def enter(self, place: Mapping[str, Any]) -> int:
        """Let the epoch of ``place`` begin there, once :meth:`begin_epoch` has named it.

        Args:
            place: As :attr:`position` of a loader with the same number of workers gave it.

        Returns:
            How many batches come before it once more; they are to be skipped.
        """
        assert self.position is not None
        assert isinstance(self.dataset, IterableStream)
        self.dataset.enter(place["epoch"], starts(place))
        self.position.begin(place["epoch"], place)
        return repeated(place)

    def continue_order(self, seed: int | None) -> None:
        """Order the indices by ``seed``, as :func:`order_seed` told it of the loader that the run began with."""
        if self.sampler is not None:
            self.sampler.order_seed = seed

    def close(self) -> None:
        """From the next iteration on, there are no batches."""
        if isinstance(self.dataset, IterableStream):
            self.dataset.run_has_ended = True
        if self.sampler is not None:
            self.sampler.closed = True

    def give_back(self) -> None:
        """Put the loader's own parts back."""
        if self.sampler is not None:
            self.sampler.release()
        _undo(self.base)
        let_in(self.loader, _undo_in)


def _exchange(base: Any, name: str, value: Any) -> None:
    # DataLoader refuses new values of these attributes after __init__, since it cannot know that the new parts fit
    # the old ones. These do: they are the old ones, wrapped.
    object.__setattr__(base, name, value)


def take_over(loader: Any, *, seed: int, rank: int) -> LoaderTakeover:
    """Put the dataset, the sampler and the collation of ``loader`` under streams of (``seed``, epoch, batch, ``rank``).

    Args:
        loader: A torch ``DataLoader``, or what accelerate made of one; :func:`obstacle` must be None.
        rank: The global rank of this process; ranks make different random numbers.
    """
    base = _base(loader)
    begin_anew(base)
    _undo(base)  # an earlier run may have been interrupted by an exception
    parts = ("dataset", "collate_fn", "generator", "worker_init_fn")
    before = {name: getattr(base, name) for name in parts}
    kind = IterableStream if isinstance(base.dataset, IterableDataset) else MapStream
    # Each rank runs through the whole of a dataset that accelerate shards by position: all must see the same items.
    same_on_all_ranks = type(base.dataset).__name__ == "IterableDatasetShard"
    dataset = kind(base.dataset, base.collate_fn, seed, 0 if same_on_all_ranks else rank)
    sampler = None
    if isinstance(dataset, MapStream):
        slot = "batch_sampler" if base.batch_sampler is not None else "sampler"
        before[slot] = getattr(base, slot)
        sampler = TicketSampler(before[slot], seed)
        _exchange(base, slot, sampler)
    _exchange(base, "dataset", dataset)
    base.collate_fn = Collation(dataset)
    # A loader draws a base seed at each iter(), with no workers too: from this generator, not from the global one.
    base.generator = torch.Generator().manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
    base.worker_init_fn = WorkerStart(dataset, base.worker_init_fn, persistent=base.persistent_workers)
    setattr(base, _BEFORE, before)
    keep_out(base, _undo_in)
    if loader is not base:
        keep_out(loader, _undo_in)  # Python 3.10 would ask the one inside for the attributes of this one
    return LoaderTakeover(loader, base, dataset, sampler)


def _reliance(loader: Any, base: Any, dataset: MapStream | IterableStream) -> Reliance:
    """How far the state of the dataset says where training is, as this loader makes batches of it."""
    if not isinstance(dataset, IterableStream):
        return Reliance("it is not a stream")
    owned = dataset.owned_generators()
    if owned:
        return Reliance(f"{', '.join(owned)} keeps state from one batch to the next")
    if type(base).__module__.startswith("torchdata."):
        return Reliance(f"a {type(base).__name__} keeps its own position")
    if not getattr(base, "in_order", True) and base.num_workers > 1:
        return Reliance("batches come in the order in which workers finish them")
    if type(loader).__name__ == "DataLoaderDispatcher" and loader.state.num_processes > 1:
        return Reliance("one process reads the data for all")  # and completes their last batch from the first one
    return reliance(dataset.inner, base.num_workers)


def _undo(base: Any) -> None:
    """Put the parts of a loader back that is taken over; another is left as it is."""
    let_in(base, _undo_in)
    _undo_in(vars(base))
    # Workers that persist hold the parts they were started with.
    forget_iterator(base)


def _undo_in(attributes: dict[str, Any]) -> None:
    attributes.update(attributes.pop(_BEFORE, {}))
