"""The snapshots of one training, and what waits for them between a save and the next optimizer step.

Promise: no optimizer that :meth:`AsyncCapture.wait_before` was told of steps while a snapshot reads what it writes to.
Where one cannot be made to wait, everything is copied at once. A snapshot that something else has written to is found
before or at that step, and the next one is taken without overlap.

The memory of the snapshots is taken once, laid out like the files that they are written to, and kept. Promise: one
snapshot at most lies in it. Its size is that of the storages, rounded up to pages, and of what a file has between its
tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from hf_lifecycle.copies import Hook
from hf_lifecycle.saving.captured import Captured
from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.live import stepping
from hf_lifecycle.saving.snapshots.memory import Arena, Region, available_memory
from hf_lifecycle.saving.snapshots.placement import LiveTensor, Placement
from hf_lifecycle.saving.snapshots.sample import Known
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, Watch
from hf_lifecycle.saving.task import Task
from hf_lifecycle.torch_internals import storage_id

__all__ = ["AsyncCapture", "SnapshotMemory"]

logger = logging.getLogger("hf_lifecycle")


class SnapshotMemory:
    """The memory that one snapshot after the other lies in, and what is known of the tensors from before."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._written_between: set[str] = set()  # tensors that change between a save and the next optimizer step
        self._turn = 0  # of the samples
        self._placement: Placement | None = None  # of the last snapshot
        self._views = Known(), Known()
        self._regions: Mapping[str, Region] = {}  # of the arena, by file

    @staticmethod
    def size_for(tensors: Iterable[LiveTensor]) -> int:
        """Bytes that a snapshot of these tensors takes."""
        return sum(Placement(tensors).sizes)

    def prepare(self, tensors: Iterable[LiveTensor], plans: Iterable[Plan] = ()) -> None:
        """Make room for snapshots of these tensors, where it is not there yet, and touch it.

        Args:
            plans: The files that the copies are laid out like.
        """
        placement = Placement(tensors)
        free = {storage_id(storage): (slot, owners) for slot, (storage, owners) in enumerate(placement.storages)}
        regions = {}
        for plan in plans:
            offsets = {}
            for storage, offset in plan.places.items():
                slot, owners = free.get(storage, (0, ()))
                if owners and all(offset % live.tensor.element_size() == 0 for live in owners):
                    offsets[slot] = offset  # a copy is read as numbers, which begin at multiples of their size
                    del free[storage]
            regions[plan.name] = Region(plan.size, offsets)
        self._make_room(placement, regions)

    def _make_room(self, placement: Placement, regions: Mapping[str, Region]) -> None:
        self._arena = None  # the old one goes before the new one comes
        device = next((one for one in placement.devices if one.type == "cuda"), None)
        self._arena = Arena(placement.sizes, list(regions.values()), device)
        self._regions = regions

    def fits(self, tensors: Sequence[LiveTensor]) -> bool:
        """Whether there is room for snapshots of these tensors."""
        return self._arena is not None and self._arena.fits(self._placed(tensors).sizes)

    def _placed(self, tensors: Sequence[LiveTensor]) -> Placement:
        if self._placement is None or not self._placement.is_of(tensors):
            self._placement = Placement(tensors)
        return self._placement

    def watch(self, tensors: Sequence[LiveTensor]) -> list[Watch]:
        """Begin to look which tensors change from now to the next optimizer step; nothing is copied."""
        self._turn += 1
        watched = self._placed(tensors).parted(self._written_between, overlap=True).watched
        return [
            Watch(each, self._written_between, self._turn, known)
            for each, known in zip(watched, self._views, strict=True)
        ]

    def take(self, tensors: Sequence[LiveTensor], *, overlap: bool = True) -> Snapshot:
        """Begin a snapshot of these tensors; it is the only one in this memory until it is done with.

        Args:
            overlap: Whether a thread may copy while training continues. Else all is copied when this returns.
        """
        placement = self._placed(tensors)
        if self._arena is None or not self._arena.fits(placement.sizes):
            self._make_room(placement, {})
        assert self._arena is not None
        images = {name: (number, region) for number, (name, region) in enumerate(self._regions.items())}
        self._turn += 1
        return Snapshot(placement, self._arena, images, self._written_between, self._turn, self._views, overlap=overlap)

    def close(self) -> None:
        """Give the memory back."""
        self._arena = self._placement = None
        for known in self._views:
            known.clear()


_ROOM = 1.1  # of what a snapshot takes must be free before its memory is taken


class AsyncCapture:
    """Takes snapshots while training continues, one after the other, in memory that is kept."""

    def __init__(self) -> None:
        self._memory = SnapshotMemory()
        self._planned: Callable[[], object] | None = None  # makes room
        self._warming: Task | None = None
        self._watches: list[Watch] = []  # of a save made in the loop, until the next step
        self._last: Captured | None = None  # handed to the writer, and no optimizer has stepped since
        self._watched: list[tuple[torch.optim.Optimizer, Any]] = []  # with the handle of the hook
        self._never = False
        self._never_told = ""  # the class of the optimizer that cannot be made to wait
        self._at_once = False  # the next snapshot is taken without overlap
        self._torn = False

    def wait_before(self, optimizers: Iterable[Any]) -> None:
        """Let every step of these optimizers, wrapped or not, wait for the copy. Those known already stay."""
        given = list(optimizers)
        self._never = not given
        for wrapped in given:
            one = stepping(wrapped)
            if any(one is known for known, _ in self._watched):
                continue
            try:
                handle = None if one is None else one.register_step_pre_hook(Hook(self._before_step))
            except AttributeError:  # a subclass that did not call Optimizer.__init__
                handle = None
            if one is None or handle is None:
                self._never, told = True, self._never_told
                self._never_told = type(wrapped if one is None else one).__qualname__
                if told != self._never_told:
                    said = (
                        "each save copies everything at once, which stops training for longer: a %s has no hook "
                        "before its step"
                    )
                    logger.info(said, self._never_told)
            else:
                self._watched.append((one, handle))

    def _before_step(self, *_: Any) -> None:
        for watch in self._watches:
            watch.changed()
        self._watches = []
        if self._last is not None:
            self._last.stall += self._last.snapshot.fence()
            self._torn |= bool(self._last.snapshot.torn)
            self._last = None

    def prepare(self, tensors: Sequence[LiveTensor], plans: Sequence[Plan] = ()) -> str | None:
        """Plan room for snapshots of these tensors, and look which of them change before the next step.

        Args:
            plans: The files that the copies are laid out like.

        Returns:
            Why there is no room; None if there is.
        """
        needed, free = SnapshotMemory.size_for(tensors), available_memory()
        if free is not None and free < needed * _ROOM:
            return f"a snapshot needs {needed:,} bytes of host memory, and {free:,} are free"
        if self._warming is not None:  # for what was learned before: it would write to the memory that is made now
            self._warming.join()
        self._watches = self._memory.watch(tensors)
        self._planned = lambda: self._memory.prepare(tensors, plans)
        return None

    def warm(self) -> None:
        """Make the room that was planned, in a thread: it takes as long as a save, and the memory's whole bandwidth."""
        planned, self._planned = self._planned, None
        if planned is not None:
            try:
                self._warming = Task(planned, "hf_lifecycle-memory")
            except RuntimeError:  # there is no thread to be had; it is tried again when the room is needed
                self._planned = planned

    def obstacle(self) -> str | None:
        """Wait until there is room. Returns why there is none."""
        self.warm()
        if self._planned is not None:
            return "there is no thread to be had"
        warming, self._warming = self._warming, None
        failure = warming.failure() if warming is not None else None
        return None if failure is None else f"{type(failure).__name__}: {failure}"

    def make_room(self, tensors: Sequence[LiveTensor], plans: Callable[[], Sequence[Plan]]) -> str | None:
        """Wait until there is room for a snapshot of these tensors, anew where what there is does not fit them.

        Args:
            plans: Gives the files that the copies are laid out like.

        Returns:
            Why there is none.
        """
        failure = self.obstacle()
        if failure is not None or self._memory.fits(tensors):
            return failure
        self._memory.close()  # it is of no use, and counts as taken
        return self.prepare(tensors, plans()) or self.obstacle()

    def take(self, tensors: Sequence[LiveTensor], *, overlap: bool = True) -> Snapshot:
        """Begin a snapshot; it is the only one until it is done with."""
        overlap, self._at_once = overlap and not (self._at_once or self._never), False
        return self._memory.take(tensors, overlap=overlap)

    def guard(self, save: Captured) -> None:
        """Let the next step wait for the snapshot of this save."""
        self._last = save

    def torn_so_far(self) -> bool:
        """Whether the last snapshot is torn. Before the next step, it is waited for only if something has changed."""
        if self._last is None:
            return self._torn
        if not self._last.snapshot.touched:
            return False
        self._torn |= not self._last.snapshot.settled
        return self._torn

    def make_up(self) -> bool:
        """Whether a snapshot was found torn since this was last asked; then the next one is taken without overlap."""
        torn, self._torn = self._torn, False
        self._at_once |= torn
        return torn

    def settle(self) -> None:
        """The last save is written, or another one takes its place: no step waits for it."""
        self._last, self._torn = None, False

    def release(self) -> None:
        """Give the memory back. Snapshots may be taken again."""
        if self._warming is not None:
            self._warming.join()
        self._watches, self._planned, self._warming = [], None, None
        self.settle()
        self._memory.close()

    def close(self) -> None:
        """Give the memory back, and let optimizers step as they like."""
        for _, handle in self._watched:
            handle.remove()
        self._watched = []
        self.release()
