"""Memory for snapshots is page-aligned, apart, and judged by what the system says is left."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.snapshots import memory
from hf_lifecycle.saving.snapshots.memory import Arena, available_memory


def test_slots_are_aligned_and_do_not_overlap() -> None:
    sizes = [1, 4096, 0, 5000, 3]
    arena = Arena(sizes)
    for number, size in enumerate(sizes):
        slot = arena.slot(number)
        assert slot.numel() == size
        assert slot.data_ptr() % 4096 == 0 or not size
        slot.fill_(number)
    for number, size in enumerate(sizes):
        assert torch.equal(arena.slot(number), torch.full((size,), number, dtype=torch.uint8))
    assert arena.fits(sizes)
    assert not arena.fits(sizes[1:])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_child_process_does_not_inherit_the_memory() -> None:
    arena = Arena([1 << 20])
    arena.touch()
    child = os.fork()
    if child == 0:
        maps = Path("/proc/self/maps").read_text()
        address = arena.slot(0).data_ptr()
        ranges = [tuple(int(part, 16) for part in line.split()[0].split("-")) for line in maps.splitlines()]
        os._exit(any(begin <= address < end for begin, end in ranges))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is here, so the memory can be locked")
def test_memory_that_cannot_be_locked_serves_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    arena = Arena([5000], device=torch.device("cuda", 0))
    arena.slot(0).fill_(3)
    assert int(arena.slot(0).sum()) == 15000
    assert "(8192 bytes) cannot be locked for copies from the device" in caplog.text


class Runtime:
    """As much of CUDA's runtime as locks memory."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool, bool]] = []  # with: on the main thread, and whether the memory is there

    def _note(self, what: str, pointer: int) -> int:
        maps = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
        is_there = any(int(begin, 16) <= pointer < int(end, 16) for begin, end in maps)
        self.calls.append((what, threading.current_thread() is threading.main_thread(), is_there))
        return 0

    def cudaHostRegister(self, pointer: int, size: int, flags: int) -> int:  # noqa: N802
        return self._note("lock", pointer)

    def cudaHostUnregister(self, pointer: int) -> int:  # noqa: N802
        return self._note("unlock", pointer)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no maps here")
def test_memory_is_locked_by_a_thread_of_its_own_and_unlocked_before_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime: Any = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    arena = Arena([3 << 20], device=torch.device("cuda", 0))
    kept = arena.slot(0).numpy()
    del arena
    gc.collect()
    assert runtime.calls == [("lock", False, True)]
    del kept
    gc.collect()
    assert runtime.calls[1:] == [("unlock", True, True)]


def test_least_of_machine_and_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_of_machine", lambda: 100)
    monkeypatch.setattr(memory, "_of_group", lambda: 40)
    assert available_memory() == 40
    monkeypatch.setattr(memory, "_of_group", lambda: None)
    assert available_memory() == 100
    monkeypatch.setattr(memory, "_of_machine", lambda: None)
    assert available_memory() is None


def test_this_machine_has_some() -> None:
    if Path("/proc/meminfo").exists():
        assert (available_memory() or 0) > 1 << 20
