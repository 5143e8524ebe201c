"""Memory that is kept from save to save, and a stream for copies into it.

It is page-aligned, not inherited by child processes, and given back when closed. First touch of fresh memory costs more
than the copy into it, so it is touched once, ahead of its use. The CUDA stream is one beside that which trains, for
copies that training waits for at a fence alone.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.saving.task import Task

__all__ = ["Arena", "Region", "SideStream", "available_memory", "host_memory"]

logger = logging.getLogger(__name__)

_ALIGNMENT = 4096


def host_memory(size: int) -> tuple[torch.Tensor, npt.NDArray[np.uint8]]:
    """``size`` bytes, page-aligned, as a tensor, and the array that keeps the map which they lie in."""
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, max(size, 1), **flags)
    for advice in ("MADV_DONTFORK", "MADV_HUGEPAGE"):  # workers that are forked meanwhile have no use for it
        number = getattr(mmap, advice, None)
        if number is not None:
            try:
                memory.madvise(number)
            except OSError:  # a kernel without huge pages
                logger.debug("%s is not available", advice)
    array = np.frombuffer(memory, np.uint8)
    return torch.from_numpy(array), array


def _lock(array: npt.NDArray[np.uint8], device: torch.device) -> str:
    """Lock memory for copies from a CUDA device, until the array goes. Returns why it cannot be; "" where it is.

    ``torch.empty(pin_memory=True)`` would take the next power of two of what is asked for, and keep it for the process.
    """
    answers: list[str] = []
    # Invariant: in a thread of its own. CUDA keeps an error for the thread that met it, and torch would raise it there
    # at the next kernel, which is training's.
    failure = Task(lambda: answers.append(_register(array, device)), "hf_lifecycle-lock").failure()
    return answers[0] if answers else f"{type(failure).__name__}: {failure}"


def _register(array: npt.NDArray[np.uint8], device: torch.device) -> str:
    try:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        with torch.cuda.device(device):  # a thread begins with the first device, which may be another rank's
            error = runtime.cudaHostRegister(array.ctypes.data, array.size, 1)  # 1: for every device
        if int(error) != 0:
            return str(torch.cuda.CudaError(int(error)))
        # Invariant: the array, not the map: a map calls who waits for its end when its memory is gone already.
        weakref.finalize(array, _unlock, array.ctypes.data, device).atexit = False
    except (AssertionError, AttributeError, RuntimeError) as raised:  # as torch does without CUDA, or another's build
        return f"{type(raised).__name__}: {raised}"
    return ""


def _unlock(pointer: int, device: torch.device) -> None:
    with torch.cuda.device(device):
        torch.cuda.cudart().cudaHostUnregister(pointer)  # type: ignore[no-untyped-call]


class Region(NamedTuple):
    """A part of an arena that is laid out like a file.

    Attributes:
        offsets: Where slots begin in it, by their number.
    """

    size: int
    offsets: Mapping[int, int]


class Arena:
    """One piece of host memory, cut into slots.

    Args:
        sizes: Bytes of each slot.
        regions: The slots that lie in regions; each of the others has a place of its own.
        device: The CUDA device that copies come from, which the memory is locked for; None for copies from memory.
    """

    def __init__(self, sizes: list[int], regions: Sequence[Region] = (), device: torch.device | None = None) -> None:
        self._sizes = list(sizes)
        self._begins: dict[int, int] = {}
        self._regions: list[tuple[int, int]] = []
        self.size = 0
        for region in regions:
            begin = self._reserve(region.size)
            self._regions.append((begin, self.size - begin))
            self._begins |= {slot: begin + offset for slot, offset in region.offsets.items()}
        for slot, size in enumerate(sizes):
            if slot not in self._begins:
                self._begins[slot] = self._reserve(size)
        self._memory, array = host_memory(self.size)
        self.touch()  # before it is locked: the driver would find its pages one by one, and kernels wait meanwhile
        if device is not None and (why := _lock(array, device)):
            logger.warning(
                "the host memory for saves (%d bytes) cannot be locked for copies from the device: %s; saves are "
                "still complete, but stop training for longer",
                self.size,
                why,
            )

    def _reserve(self, size: int) -> int:
        begin = self.size
        self.size += -(-size // _ALIGNMENT) * _ALIGNMENT
        return begin

    def slot(self, number: int) -> torch.Tensor:
        """The bytes of a slot."""
        begin = self._begins[number]
        return self._memory[begin : begin + self._sizes[number]]

    def region(self, number: int) -> torch.Tensor:
        """The bytes of a region, up to a multiple of 4096."""
        begin, size = self._regions[number]
        return self._memory[begin : begin + size]

    def touch(self) -> None:
        """Let the system find all of the memory now."""
        self._memory[::_ALIGNMENT] = 0

    def fits(self, sizes: list[int]) -> bool:
        """Whether the slots are of these sizes."""
        return self._sizes == sizes


def available_memory() -> int | None:
    """Bytes that this process may still use before the system swaps or kills; None where that is not told.

    The least of what the machine has and what the process's control group allows.
    """
    found = [number for number in (_of_machine(), _of_group()) if number is not None]
    return min(found) if found else None


def _of_machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _of_group() -> int | None:
    """What is left of the control group's limit; its page cache counts as free, since it is given back on demand."""
    root = Path("/sys/fs/cgroup")
    for limit, usage, statistics in (
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ):
        try:
            most, used = (root / limit).read_text().strip(), int((root / usage).read_text())
            rows = dict(line.split() for line in (root / statistics).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if most.isdigit() and int(most) < 1 << 60:
            return max(int(most) - used + int(rows.get("inactive_file", 0)), 0)
    return None


class SideStream:
    """Where copies from an accelerator run; of no use, and no cost, where the tensors are on the CPU.

    Args:
        device: The accelerator; None for the CPU.
    """

    def __init__(self, device: torch.device | None) -> None:
        self.used = device is not None
        self._device = device

    @classmethod
    def of(cls, devices: Iterable[torch.device]) -> SideStream:
        """The stream for copies of what lies on these."""
        return cls(next((device for device in devices if device.type == "cuda"), None))

    def enter(self) -> None:
        """Let the side stream begin where the training stream is now, after the copies that were asked for on it."""
        if self.used:
            self._training = torch.cuda.current_stream(self._device)
            self._side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            self._side.wait_stream(self._training)

    def side(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, copies are asked for on the side stream; for any thread."""
        return torch.cuda.stream(self._side) if self.used else contextlib.nullcontext()

    def training(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, what is asked of the device comes after all that training asked for; for any thread."""
        return torch.cuda.stream(self._training) if self.used else contextlib.nullcontext()

    def finish(self) -> None:
        """Wait until the copies are made."""
        if self.used:
            self._side.synchronize()
