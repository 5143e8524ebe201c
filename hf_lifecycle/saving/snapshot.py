"""A copy of live tensors as they are at one moment, made while training goes on.

Promise: a snapshot that is :attr:`~Snapshot.settled` holds the bytes that the tensors had when it was asked for, of
all of them. What a forward pass may write is copied at once; the rest by the thread that writes it, which begins with
:meth:`Snapshot.wait`, while the next forward and backward run. :meth:`Snapshot.fence`, called before anything writes to
it (an optimizer's step), helps to copy what is left, and waits. A tensor that changed all the same is found by its
version counter or its address; then the snapshot is torn, never settled, and nothing may be committed from it.

A write through ``tensor.data`` moves no version counter. So a few elements of every tensor are looked at when the
snapshot is asked for, in the copy, and at the fence; other ones at each save. Not promised: that such a write is
noticed where it misses them all, or was put back when they are looked at. What is copied is whole storages, so that
tensors which share memory share it in the copy too.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from hf_lifecycle.saving.image import Image
from hf_lifecycle.saving.memory import Arena, Region
from hf_lifecycle.saving.sample import Known, Sample
from hf_lifecycle.saving.streams import SideStream
from hf_lifecycle.torch_internals import storage_id, version_counter

__all__ = ["LiveTensor", "Snapshot", "Storages", "Watch", "bytes_of", "storages_of", "version_of"]


class LiveTensor(NamedTuple):
    """A tensor to be copied.

    Attributes:
        name: What a message calls it, and what its copy is asked for by; no two have the same.
        tensor: A dense tensor that holds data.
        at_once: Whether anything but an optimizer's step may write to it.
        is_alias: Whether nobody else has this object, so that it lies where it does, whatever becomes of others.
    """

    name: str
    tensor: torch.Tensor
    at_once: bool
    is_alias: bool = False


Storages = list[tuple[torch.UntypedStorage, list[LiveTensor]]]


def version_of(tensor: torch.Tensor) -> tuple[int, int]:
    """What changes when a tensor is written to in place, or its memory replaced."""
    return version_counter(tensor), tensor.data_ptr()


def bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    """The bytes of a storage, not copied."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Watch:
    """Tensors with their versions, and a few of their elements, at one moment.

    Args:
        tensors: Those to watch.
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
        self._tensors = [(live, version_of(live.tensor)) for live in tensors]
        self._written_between = written_between
        self._sample = Sample({live.name: live.tensor for live, _ in self._tensors}, turn, views)

    @property
    def has_changed(self) -> bool:
        """Whether any of them changed so far."""
        return any(version_of(live.tensor) != version for live, version in self._tensors) or bool(
            self._sample.changed()
        )

    def changed(self) -> list[str]:
        """The names of those that changed since; from now on these are copied at once."""
        seen = set(self._sample.changed())
        names = [
            live.name for live, version in self._tensors if live.name in seen or version_of(live.tensor) != version
        ]
        self._written_between.update(names)
        return names

    def unlike(self, copy_of: Callable[[str], torch.Tensor]) -> list[str]:
        """The names of those whose copies are not what the tensors were; these, too, are copied at once from now on."""
        names = self._sample.unlike(copy_of)
        self._written_between.update(names)
        return names


class Snapshot:
    """See :meth:`~hf_lifecycle.saving.snapshot_memory.SnapshotMemory.take`."""

    def __init__(
        self,
        storages: Storages,
        arena: Arena,
        regions: Mapping[str, tuple[int, Region]],
        written_between: set[str],
        turn: int,
        views: Known,
        *,
        overlap: bool,
    ) -> None:
        began = time.perf_counter()
        self._arena = arena
        self._regions = regions
        self.torn: list[str] = []  # the names of tensors that changed under the copy
        self._fenced = False
        self._lock = threading.Lock()
        self._copied = threading.Event()
        self._failure: BaseException | None = None
        self._slots: dict[int, int] = {}
        self._places: dict[str, tuple[int, torch.Tensor]] = {}  # the slot, and an alias of the live tensor
        self._keep_alive = storages
        self._later: deque[tuple[int, torch.UntypedStorage]] = deque()
        at_once: list[tuple[int, torch.UntypedStorage]] = []
        waits_for: list[LiveTensor] = []
        for number, (storage, owners) in enumerate(storages):
            self._slots[storage_id(storage)] = number
            soon = not overlap
            for live in owners:
                self._places[live.name] = number, live.tensor if live.is_alias else live.tensor.detach()
                soon = soon or live.at_once or live.name in written_between
            if not soon:
                self._later.append((number, storage))
                waits_for += owners
            else:
                at_once.append((number, storage))
        self._left = len(self._later)  # not copied yet; those that a thread is copying included
        self._watch = Watch(waits_for, written_between, turn, views)
        self._stream = SideStream.of(storage.device for storage, _ in storages)
        for number, storage in at_once:
            self._copy(number, storage)
        self._stream.enter()
        if not self._left and not self._stream.used:
            self._copied.set()
        self.seconds_at_once = time.perf_counter() - began

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors' storages."""
        return sum(storage.nbytes() for storage, _ in self._keep_alive)

    def _copy(self, number: int, storage: torch.UntypedStorage) -> None:
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
                    self._copy(*work)
            self._stream.finish()
        except BaseException as error:  # noqa: BLE001 - raised by wait, on the thread that can act on it
            self._failure = error
            while self._next() is not None:  # none of it is of use
                done += 1
        finally:
            with self._lock:
                self._left -= done
                is_last = not self._left and not self._copied.is_set()
            if is_last:
                self._look_at_copies()

    def _look_at_copies(self) -> None:
        """By the thread that made the last copy: are they what the tensors were?"""
        try:
            if self._failure is None:
                self.torn = self._watch.unlike(self.named)
        except BaseException as error:  # noqa: BLE001 - as above
            self._failure = error
        finally:
            self._copied.set()

    def _next(self) -> tuple[int, torch.UntypedStorage] | None:
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
                # by the writer, when all is written. A write that is still going on moves its counter when it ends: on
                # the fence's thread that is before the fence; on any other it would have to outlast the writing.
                self.torn = list(dict.fromkeys([*self.torn, *self._watch.changed()]))
                self._fenced = True

    def wait(self) -> None:
        """Copy what is not copied yet, and return when all is; for the thread that writes it."""
        self._copy_later()
        self._copied.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def touched(self) -> bool:
        """Whether something was written to that is copied while training goes on; copied by then or not."""
        return bool(self.torn) or (not self._fenced and self._watch.has_changed)

    @property
    def settled(self) -> bool:
        """Whether the copy is whole and of one moment; asked before a commit."""
        self.wait()
        self._check()
        return not self.torn

    def storage(self, storage: torch.UntypedStorage) -> torch.Tensor:
        """The copy of a live storage's bytes."""
        return self._arena.slot(self._slots[storage_id(storage)])

    def image(self, file: str) -> Image | None:
        """The memory that is laid out like ``file``, if there is some."""
        number, region = self._regions.get(file, (0, None))
        if region is None:
            return None
        return Image(self._arena.region(number).numpy(), region.size, len(region.offsets))

    def has(self, name: str) -> bool:
        """Whether the live tensor ``name`` was copied."""
        return name in self._places

    def named(self, name: str) -> torch.Tensor:
        """The copy of the live tensor ``name``: same element type, shape and strides, on the CPU."""
        return self._rebuild(*self._places[name])

    def tensor(self, live: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor that lies in the storage of a live one, and does not change its place."""
        return self._rebuild(self._slots[storage_id(live)], live)

    def _rebuild(self, slot: int, live: torch.Tensor) -> torch.Tensor:
        flat = self._arena.slot(slot)
        if live.numel() == 0 or flat.numel() == 0:
            return torch.empty(live.shape, dtype=live.dtype)
        whole = flat[: flat.numel() // live.dtype.itemsize * live.dtype.itemsize].view(live.dtype)
        return whole.as_strided(live.shape, live.stride(), int(whole.storage_offset() + live.storage_offset()))

    def tree(self, live: Any) -> Any:
        """Nested plain containers with the copies in the place of the live tensors."""
        if isinstance(live, torch.Tensor):
            return self.tensor(live)
        if isinstance(live, Mapping):
            return {key: self.tree(value) for key, value in live.items()}
        if isinstance(live, (list, tuple)):
            return type(live)(self.tree(value) for value in live)
        return live


def storages_of(tensors: Iterable[LiveTensor]) -> Storages:
    """The storages of the tensors, each once, with the tensors that lie in it."""
    found: dict[int, tuple[torch.UntypedStorage, list[LiveTensor]]] = {}
    for live in tensors:
        storage = live.tensor.untyped_storage()
        found.setdefault(storage_id(storage), (storage, []))[1].append(live)
    return list(found.values())
