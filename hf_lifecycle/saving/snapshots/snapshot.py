"""A copy of live tensors as they are at one moment, made while training continues.

Promise: a snapshot that is :attr:`~Snapshot.settled` holds the bytes that the tensors had when it was asked for, of
all of them. What a forward pass may write is copied at once; the rest by the thread that writes it, which begins with
:meth:`Snapshot.wait`, while the next forward and backward run. :meth:`Snapshot.fence`, called before anything writes to
it (an optimizer's step), helps to copy what is left, and waits. A tensor that changed all the same is found by its
version counter or its address; then the snapshot is torn, never settled, and nothing may be committed from it.

A write through ``tensor.data`` moves no version counter. So a few elements of every tensor are looked at when the
snapshot is asked for, in the copy, and at the fence; other ones at each save. Not promised: that such a write is
noticed where it misses them all, or was restored when they are looked at. What is copied is whole storages, so that
tensors which share memory share it in the copy too.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from hf_lifecycle.saving.snapshots.image import Image
from hf_lifecycle.saving.snapshots.memory import Arena, Region, SideStream
from hf_lifecycle.saving.snapshots.placement import LiveTensor, Placement
from hf_lifecycle.saving.snapshots.sample import Known, Sample
from hf_lifecycle.state.proof import with_tensors
from hf_lifecycle.torch_internals import storage_id, version_counter, version_counters

__all__ = ["Snapshot", "Watch", "bytes_of", "version_of"]


def version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to in place, or its memory replaced."""
    return version_counter(tensor), tensor.data_ptr()


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage, not copied."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Watch:
    """Tensors with their versions, and a few of their elements, at one moment.

    Args:
        written_between: Is told the names of those that changed.
        turn: A number that is another one each time, so that other elements are looked at.
        views: What is kept from one to the next, to be faster.
    """

    def __init__(
        self,
        tensors: Iterable[LiveTensor],
        written_between: set[str],
        turn: int = 0,
        views: Known | None = None,
    ) -> None:
        every = list(tensors)
        self._tensors = {live.name: live.tensor for live in every}
        wholes = [live.tensor if live.whole is None else live.whole for live in every]
        self._wholes = wholes if any(live.whole is not None for live in every) else []
        self._versions = self._versions_now()
        self._written_between = written_between
        self._sample = Sample(self._tensors, turn, views)

    def sees(self, tensor: torch.Tensor) -> bool:
        """Whether this very object is watched."""
        return id(tensor) in self._ids

    @functools.cached_property
    def _ids(self) -> frozenset[int]:
        return frozenset(map(id, self._wholes or self._tensors.values()))

    def _versions_now(self) -> list[tuple[int, ...]]:
        """The :func:`version_of` each, in less time; of a part, that of its whole too."""
        tensors = self._tensors.values()
        found = [version_counters(tensors), [one.data_ptr() for one in tensors]]
        if self._wholes:
            found.append(version_counters(self._wholes))
        return list(zip(*found, strict=True))

    @property
    def has_changed(self) -> bool:
        """Whether any of them changed so far."""
        return self._versions_now() != self._versions or bool(self._sample.changed())

    def changed(self) -> list[str]:
        """The names of those that changed since; from now on these are copied at once."""
        names = self._sample.changed()
        now = self._versions_now()
        if names or now != self._versions:
            seen = set(names)
            each = zip(self._tensors, now, self._versions, strict=True)
            names = [name for name, version, before in each if name in seen or version != before]
        self._written_between.update(names)
        return names

    def unlike(self, copy_of: Callable[[str], torch.Tensor]) -> list[str]:
        """The names of those whose copies are not what the tensors were; these, too, are copied at once from now on."""
        names = self._sample.unlike(copy_of)
        self._written_between.update(names)
        return names


class Snapshot:
    """See :meth:`~hf_lifecycle.saving.snapshots.async_capture.SnapshotMemory.take`."""

    def __init__(
        self,
        placement: Placement,
        arena: Arena,
        regions: Mapping[str, tuple[int, Region]],
        written_between: set[str],
        turn: int,
        views: tuple[Known, Known],
        *,
        overlap: bool,
    ) -> None:
        self._arena = arena
        self._regions = regions
        self.torn: list[str] = []  # the names of tensors that changed under the copy
        self._fenced = False
        self._lock = threading.Lock()
        self._copied = threading.Event()
        self._failure: BaseException | None = None
        self._placement = placement
        at_once, later, watched = placement.parted(written_between, overlap=overlap)
        self._later = deque(later)
        self._left = len(later)  # not copied yet; those that a thread is copying included
        self._watches = [Watch(each, written_between, turn, known) for each, known in zip(watched, views, strict=True)]
        self._stream = SideStream.of(placement.devices)
        for number in at_once:
            self._copy(number)
        self._stream.enter()
        self._is_looked_at = not self._left and not self._stream.used  # by one thread: what it finds is kept
        if self._is_looked_at:
            self._copied.set()

    @property
    def watch(self) -> Watch:
        """Of the tensors that others have too, from the moment of the snapshot on, but for those copied at once."""
        return self._watches[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors' storages."""
        return sum(self._placement.sizes)

    def _copy(self, number: int) -> None:
        storage = self._placement.storages[number][0]
        if storage.nbytes() == 0:
            return
        source, target = bytes_of(storage), self._arena.slot(number)
        if source.device.type == "cpu":  # one plain copy without the interpreter lock, and without torch's threads
            np.copyto(target.numpy(), source.numpy())
        else:
            target.copy_(source, non_blocking=True)

    def _copy_later(self) -> None:
        """Copy what no other thread has begun with."""
        done = 0
        try:
            with self._stream.side():
                while (work := self._next()) is not None:
                    done += 1
                    self._copy(work)
            self._stream.finish()
        except BaseException as error:  # noqa: BLE001 - raised by wait, on the thread that can act on it
            self._failure = error
            while self._next() is not None:  # none of it is of use
                done += 1
        finally:
            with self._lock:
                self._left -= done
                is_last = not self._left and not self._is_looked_at
                self._is_looked_at |= is_last
            if is_last:
                self._look_at_copies()

    def _look_at_copies(self) -> None:
        """By the thread that made the last copy: are they what the tensors were?"""
        try:
            if self._failure is None:
                self.torn = [name for watch in self._watches for name in watch.unlike(self.named)]
        except BaseException as error:  # noqa: BLE001 - as above
            self._failure = error
        finally:
            self._copied.set()

    def _next(self) -> int | None:
        try:
            return self._later.popleft()
        except IndexError:  # another thread had the last one
            return None

    def fence(self) -> float:
        """Return when nothing reads the live tensors any more; call it before they are written to.

        Returns the seconds that it took.
        """
        if self._fenced:
            return 0.0
        began = time.perf_counter()
        self._copy_later()
        self._copied.wait()
        self._check()
        return time.perf_counter() - began

    def _check(self) -> None:
        with self._lock, self._stream.training():
            if not self._fenced:
                # Invariant: looked at once, when all is copied: by the fence, before the step that may change all, or
                # by the writer, when all is written. A write that is still continuing moves its counter when it ends:
                # on the fence's thread that is before the fence; on any other it would have to outlast the writing.
                changed = [name for watch in self._watches for name in watch.changed()]
                self.torn = list(dict.fromkeys([*self.torn, *changed]))
                self._fenced = True

    def wait(self) -> None:
        """Copy what is not copied yet, and return when all is; for the thread that writes it."""
        self._copy_later()
        self._copied.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def touched(self) -> bool:
        """Whether something was written to that is copied while training continues; copied by then or not."""
        return bool(self.torn) or (not self._fenced and any(watch.has_changed for watch in self._watches))

    @property
    def settled(self) -> bool:
        """Whether the copy is whole and of one moment; asked before a commit."""
        self.wait()
        self._check()
        return not self.torn

    def storage(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The copy of a live storage's bytes."""
        return self._arena.slot(self._placement.slots[storage_id(storage)])

    def image(self, file: str) -> Image | None:
        """The memory that is laid out like ``file``, if there is some."""
        number, region = self._regions.get(file, (0, None))
        if region is None:
            return None
        return Image(self._arena.region(number).numpy(), region.size, len(region.offsets))

    def has(self, name: str) -> bool:
        """Whether the live tensor ``name`` was copied."""
        return name in self._placement.places

    def named(self, name: str) -> torch.Tensor:
        """The copy of the live tensor ``name``: same element type, shape and strides, on the CPU."""
        return self._rebuild(*self._placement.places[name])

    def tensor(self, live: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor that lies in the storage of a live one, and does not change its place."""
        return self._rebuild(self._placement.slots[storage_id(live)], live)

    def _rebuild(self, slot: int, live: torch.Tensor) -> torch.Tensor:
        flat = self._arena.slot(slot)
        if live.numel() == 0 or flat.numel() == 0:
            return torch.empty(live.shape, dtype=live.dtype)
        whole = flat[: flat.numel() // live.dtype.itemsize * live.dtype.itemsize].view(live.dtype)
        return whole.as_strided(live.shape, live.stride(), int(whole.storage_offset() + live.storage_offset()))

    def tree(self, live: Any) -> Any:
        """Nested plain containers with the copies in the place of the live tensors."""
        return with_tensors(live, self.tensor)
