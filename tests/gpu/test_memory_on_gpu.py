"""On an accelerator: memory that snapshots are copied to is locked, takes what it needs, and is given back."""

from __future__ import annotations

import gc

import pytest
import torch

from hf_lifecycle.saving.snapshots import memory
from hf_lifecycle.saving.snapshots.memory import Arena, available_memory
from tests.gpu.device import on_cuda

pytestmark = on_cuda

_SIZE = (1 << 30) + (1 << 20)  # a little over a power of two: torch's allocator would take twice as much


def _free() -> int:
    free = available_memory()
    assert free is not None
    return free


def test_locked_memory_takes_no_more_than_it_needs_and_goes_when_it_is_closed() -> None:
    torch.zeros(1, device="cuda")
    before = _free()
    arena = Arena([_SIZE], device=torch.device("cuda", 0))
    assert arena.slot(0).is_pinned()
    assert before - _free() < 1.3 * _SIZE
    del arena
    gc.collect()
    assert before - _free() < 0.3 * _SIZE


def test_copy_to_locked_memory_does_not_wait_for_the_device() -> None:
    arena = Arena([_SIZE], device=torch.device("cuda", 0))
    source = torch.full((_SIZE,), 7, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    began, ended = torch.cuda.Event(), torch.cuda.Event()
    torch.cuda._sleep(1_000_000_000)
    began.record()
    arena.slot(0).copy_(source, non_blocking=True)
    ended.record()
    assert not began.query()
    assert not ended.query()
    ended.synchronize()
    assert bool((arena.slot(0) == 7).all())


def test_memory_that_cannot_be_locked_is_told_and_the_next_kernel_is_not_to_blame(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Arena([1 << 20], device=torch.device("cuda", 0))
    monkeypatch.setattr(memory, "host_memory", lambda _: (first.slot(0), first.slot(0).numpy()))
    Arena([1 << 20], device=torch.device("cuda", 0))  # the same memory once more, which CUDA refuses
    assert "cannot be locked for copies from the device" in caplog.text
    assert torch.ones(3, device="cuda").sum().item() == 3
