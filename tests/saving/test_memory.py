"""Memory for snapshots is page-aligned, apart, and judged by what the system says is left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hf_lifecycle.saving import memory
from hf_lifecycle.saving.memory import Arena, available_memory


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
