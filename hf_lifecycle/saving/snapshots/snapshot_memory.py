"""The memory of a training's snapshots: taken once, laid out like the files that they are written to, and kept.

Promise: one snapshot at most lies in it. Its size is that of the storages, rounded up to pages, and of what a file
has between its tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.memory import Arena, Region
from hf_lifecycle.saving.snapshots.placement import LiveTensor, Placement
from hf_lifecycle.saving.snapshots.sample import Known
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, Watch
from hf_lifecycle.torch_internals import storage_id

__all__ = ["SnapshotMemory"]


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
