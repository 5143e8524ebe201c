"""Copies of what lies on the device: of one moment, on a stream beside the one that trains, into locked memory."""

from __future__ import annotations

import threading

import torch

from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory
from hf_lifecycle.saving.snapshots.live import settled_copy
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.fingerprint import tensor_digest, tensor_digests
from hf_lifecycle.state.gathering import gathered
from tests.gpu.device import DEVICE, HAS_CUDA, on_cuda, on_device

_LONG = 1_000_000_000  # clock cycles, about half a second


def _tensors() -> dict[str, torch.Tensor]:
    """What a model and its optimizer have: weights, buffers, step counts on the device and in host memory."""
    base = torch.randn(64, 96, device=DEVICE)
    return {
        "weight": torch.randn(300, 200, device=DEVICE),
        "turned": base.t(),
        "part": base[3:9],
        "bf16": torch.randn(33, device=DEVICE).to(torch.bfloat16),
        "half": torch.randn(33, device=DEVICE).half(),
        "step": torch.tensor(3.0, device=DEVICE),
        "host_step": torch.tensor(4.0),
        "mask": torch.tensor([True, False, True], device=DEVICE),
        "none": torch.empty(0, 3, device=DEVICE),
    }


def _live(tensors: dict[str, torch.Tensor]) -> list[LiveTensor]:
    return [LiveTensor(name, tensor, name == "mask") for name, tensor in tensors.items()]


def _written(taken: Snapshot) -> threading.Thread:
    writer = threading.Thread(target=taken.wait)
    writer.start()
    return writer


@on_device
def test_copy_has_the_values_of_its_moment_whatever_is_written_after_the_fence() -> None:
    tensors, memory = _tensors(), SnapshotMemory()
    memory.prepare(_live(tensors))
    for _ in range(3):  # in the same memory, one after the other
        before = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
        taken = memory.take(_live(tensors))
        writer = _written(taken)
        taken.fence()
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.mul_(2) if tensor.is_floating_point() else tensor.logical_not_()
        writer.join()
        assert taken.settled
        assert all(torch.equal(taken.named(name), value) for name, value in before.items())


@on_device
def test_write_that_moves_no_version_is_found_in_the_copy_or_at_the_fence() -> None:
    tensors = {"weight": torch.randn(100, 100, device=DEVICE), "other": torch.randn(50, device=DEVICE)}
    taken = SnapshotMemory().take(_live(tensors))
    tensors["weight"].data.add_(1)
    taken.fence()
    assert taken.torn == ["weight"]
    assert not taken.settled


@on_cuda
def test_copies_do_not_wait_for_what_training_asked_for_after_the_save() -> None:
    tensors, memory = _tensors(), SnapshotMemory()
    memory.prepare(_live(tensors))
    taken = memory.take(_live(tensors))
    torch.cuda._sleep(_LONG)
    ended = torch.cuda.Event()
    ended.record()
    taken.wait()
    assert not ended.query()
    assert torch.equal(taken.named("weight"), tensors["weight"].cpu())


@on_cuda
def test_copies_wait_for_what_training_asked_for_before_the_save() -> None:
    source = torch.zeros(1 << 22, device=DEVICE)
    torch.cuda._sleep(_LONG)
    source.add_(7)
    taken = SnapshotMemory().take([LiveTensor("source", source, False)])
    taken.wait()
    assert bool((taken.named("source") == 7).all())


@on_cuda
def test_memory_of_a_tensor_that_goes_is_not_used_again_while_it_is_copied() -> None:
    source = torch.full((1 << 24,), 3.0, device=DEVICE)
    memory = SnapshotMemory()
    memory.prepare([LiveTensor("source", source, False)])
    taken = memory.take([LiveTensor("source", source, False)])
    del source
    others = [torch.zeros(1 << 24, device=DEVICE) for _ in range(4)]
    taken.wait()
    assert bool((taken.named("source") == 3).all())
    del others


@on_cuda
def test_verdict_of_the_writer_comes_after_what_training_has_asked_for() -> None:
    """A write that is still waiting on the device when the writer looks would else be missed."""
    source = torch.ones(1000, device=DEVICE)
    taken = SnapshotMemory().take([LiveTensor("source", source, False)])
    taken.wait()
    with torch.cuda.stream(torch.cuda.Stream()):  # not the stream of this thread
        pass
    torch.cuda._sleep(_LONG)
    source.data.add_(1)
    found: list[bool] = []
    writer = threading.Thread(target=lambda: found.append(taken.settled))
    writer.start()
    writer.join()
    assert found == [False]


@on_device
def test_small_tensors_that_come_together_are_what_they_are_alone() -> None:
    tensors = _tensors()
    near = gathered(tensors)
    assert bool(near) == HAS_CUDA
    assert all(torch.equal(copy, tensors[name].cpu()) for name, copy in near.items())
    assert tensor_digests(tensors) == {name: tensor_digest(tensor) for name, tensor in tensors.items()}
    copy = settled_copy({"of": list(tensors.values())})["of"]
    assert all(one.device.type == "cpu" for one in copy)
    assert all(torch.equal(one, tensor.cpu()) for one, tensor in zip(copy, tensors.values(), strict=True))
