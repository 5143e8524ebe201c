"""A snapshot is of one moment, or it is torn and says so; nothing is written to before it is copied."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.snapshots import snapshot as module
from hf_lifecycle.saving.snapshots.async_capture import SnapshotMemory
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot


def live(*tensors: torch.Tensor, at_once: bool = False) -> list[LiveTensor]:
    return [LiveTensor(f"tensor {number}", tensor, at_once) for number, tensor in enumerate(tensors)]


class LoadGuard:
    """Lets a thread begin to copy, as the writer's does, and holds it there until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        real = Snapshot._copy

        def copy(snapshot: Snapshot, *args: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.reached.set()
                assert self.opened.wait(10)
            real(snapshot, *args)

        monkeypatch.setattr(module.Snapshot, "_copy", copy)

    def hold(self, taken: Snapshot) -> threading.Thread:
        self.reached.clear()
        writer = threading.Thread(target=taken.wait)
        writer.start()
        assert self.reached.wait(10)
        return writer


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "plain": lambda: torch.randn(7, 5),
    "bfloat16": lambda: torch.randn(9).to(torch.bfloat16),
    "turned": lambda: torch.randn(7, 5).t(),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "part": lambda: torch.randn(20)[3:9],
    "every_second": lambda: torch.randn(20)[::2],
    "none": lambda: torch.empty(0, 3),
    "one": lambda: torch.tensor(3.5),
    "bool": lambda: torch.tensor([True, False, True]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("overlap", [True, False])
def test_copy_has_values_shape_and_strides(kind: str, overlap: bool) -> None:
    tensor = KINDS[kind]()
    memory = SnapshotMemory()
    taken = memory.take(live(tensor), overlap=overlap)
    taken.fence()
    copy = taken.tensor(tensor)
    assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
    assert tensor.numel() == 0 or copy.stride() == tensor.stride()
    before = tensor.clone()
    if tensor.numel():
        tensor.zero_()
    assert torch.equal(copy, before)
    assert taken.settled


def test_tied_tensors_are_copied_once_and_stay_tied() -> None:
    weight = torch.randn(100, 10)
    both = live(weight, weight.t())
    assert SnapshotMemory.size_for(both) == weight.nbytes
    taken = SnapshotMemory().take(both)
    taken.fence()
    assert taken.tensor(weight).data_ptr() == taken.tensor(weight.t()).data_ptr()


def test_optimizer_step_waits_for_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = LoadGuard(monkeypatch)
    parameter = torch.nn.Parameter(torch.randn(1000))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    before = parameter.detach().clone()
    taken = SnapshotMemory().take(live(parameter))
    optimizer.register_step_pre_hook(lambda *_: taken.fence() and None)
    parameter.grad = torch.ones(1000)
    gate.hold(taken)
    threading.Timer(0.2, gate.opened.set).start()
    optimizer.step()
    assert gate.opened.is_set()
    assert not torch.equal(parameter, before)
    assert torch.equal(taken.tensor(parameter), before)
    assert taken.settled


def test_writer_that_looks_at_the_copies_late_does_not_undo_what_the_fence_has_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looking, opened = threading.Event(), threading.Event()
    real = module.Watch.unlike

    def unlike(watch: Any, *given: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            looking.set()
            assert opened.wait(10)
        return real(watch, *given)

    monkeypatch.setattr(module.Watch, "unlike", unlike)
    tensor = torch.randn(10)
    taken = SnapshotMemory().take(live(tensor))
    writer = threading.Thread(target=taken.wait)
    writer.start()
    assert looking.wait(10)
    tensor.mul_(1.0)
    threading.Timer(0.2, opened.set).start()
    taken.fence()
    writer.join()
    assert taken.torn == ["tensor 0"]
    assert not taken.settled


def test_fence_copies_what_the_writer_has_not_begun_with(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = LoadGuard(monkeypatch)
    tensors = [torch.randn(10) for _ in range(3)]
    taken = SnapshotMemory().take(live(*tensors))
    writer = gate.hold(taken)  # amid the first
    threading.Timer(0.2, gate.opened.set).start()
    taken.fence()
    writer.join()
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.zero_()
    assert all(torch.equal(taken.tensor(one), was) for one, was in zip(tensors, before, strict=True))
    assert taken.settled


def test_what_a_forward_may_write_is_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = LoadGuard(monkeypatch)
    norm = torch.nn.BatchNorm1d(4)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    named = [LiveTensor(name, buffer, at_once=True) for name, buffer in norm.named_buffers()]
    taken = SnapshotMemory().take([*live(norm.weight), *named])
    gate.hold(taken)
    norm(torch.randn(8, 4))
    gate.opened.set()
    taken.fence()
    assert taken.settled
    for name, buffer in norm.named_buffers():
        assert torch.equal(taken.tensor(buffer), before[name]), name


CHANGES: dict[str, Callable[[torch.Tensor], None]] = {
    "in_place": lambda tensor: tensor.mul_(2),
    "through_a_view": lambda tensor: tensor[3:4].zero_(),
    "other_memory": lambda tensor: setattr(tensor, "data", torch.zeros(1000)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_change_before_the_fence_tears_and_the_next_copies_at_once(
    change: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = LoadGuard(monkeypatch)
    tensor, calm = torch.randn(1000), torch.randn(10)
    memory = SnapshotMemory()
    taken = memory.take(live(tensor, calm))
    writer = gate.hold(taken)
    if when == "before":
        CHANGES[change](tensor)
    gate.opened.set()
    writer.join()
    if when == "after":
        CHANGES[change](tensor)
    taken.fence()
    assert taken.torn == ["tensor 0"]
    assert not taken.settled

    gate.opened.clear()
    again = memory.take(live(tensor, calm))  # now "tensor 0" is copied before this returns
    before = tensor.clone()
    gate.hold(again)
    CHANGES["in_place"](tensor)
    gate.opened.set()
    again.fence()
    assert again.settled
    assert torch.equal(again.tensor(tensor), before)


def test_change_after_the_fence_is_none_of_the_snapshots_business() -> None:
    tensor = torch.randn(1000)
    before = tensor.clone()
    taken = SnapshotMemory().take(live(tensor))
    taken.fence()
    tensor.zero_()
    assert taken.settled
    assert torch.equal(taken.tensor(tensor), before)


def test_watch_learns_what_forwards_write() -> None:
    embedding = torch.nn.Embedding(5, 3, max_norm=0.1)
    memory = SnapshotMemory()
    [watch, _] = memory.watch(live(embedding.weight))
    embedding(torch.tensor([1, 2]))
    assert watch.changed() == ["tensor 0"]
    taken = memory.take(live(embedding.weight))
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([3, 4]))
    taken.fence()
    assert taken.settled
    assert torch.equal(taken.tensor(embedding.weight), before)


def test_memory_is_the_same_from_save_to_save_and_frozen_tensors_are_copied_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[int] = []
    real = Snapshot._copy

    def copy(snapshot: Snapshot, number: int) -> None:
        copied.append(number)
        real(snapshot, number)

    monkeypatch.setattr(module.Snapshot, "_copy", copy)
    frozen = torch.nn.Parameter(torch.randn(100), requires_grad=False)
    trained = torch.nn.Parameter(torch.randn(100))
    tensors = [LiveTensor("frozen", frozen, True), LiveTensor("trained", trained, False)]
    memory = SnapshotMemory()
    addresses = set()
    for change in (None, None, lambda: frozen.data.add_(1), lambda: frozen.detach().add_(1)):
        if change is not None:
            change()
        taken = memory.take(tensors)
        taken.fence()
        assert torch.equal(taken.tensor(frozen), frozen)
        assert torch.equal(taken.tensor(trained), trained)
        addresses.add(taken.tensor(trained).data_ptr())
    assert copied.count(0) == 4  # a write may miss every sample: none decides that nothing changed
    assert copied.count(1) == 4
    assert len(addresses) == 1


def test_failure_of_the_copy_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*_: Any) -> None:
        raise MemoryError("no")

    monkeypatch.setattr(module.Snapshot, "_copy", copy)
    taken = SnapshotMemory().take(live(torch.ones(3), torch.ones(4)))
    taken.fence()  # training goes on
    with pytest.raises(MemoryError):
        taken.wait()
