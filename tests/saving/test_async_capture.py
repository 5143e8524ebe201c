"""When memory for snapshots is made, which takes as long as a save."""

from __future__ import annotations

import torch

from hf_lifecycle.saving.snapshots.async_capture import AsyncCapture
from hf_lifecycle.saving.snapshots.placement import LiveTensor


def live() -> list[LiveTensor]:
    return [LiveTensor(f"layer.{number}", torch.full((1 << 16,), float(number)), False) for number in range(4)]


def test_room_is_made_when_training_may_go_on_and_not_amid_the_save() -> None:
    capture, tensors = AsyncCapture(), live()
    assert capture.prepare(tensors) is None
    assert not capture._memory.fits(tensors)
    capture.warm()
    assert capture.obstacle() is None
    assert capture._memory.fits(tensors)
    capture.close()


def test_a_save_that_comes_before_the_room_is_made_makes_it() -> None:
    capture, tensors = AsyncCapture(), live()
    assert capture.prepare(tensors) is None
    assert capture.obstacle() is None
    assert capture._memory.fits(tensors)
    snapshot = capture.take(tensors, overlap=False)
    assert torch.equal(snapshot.named("layer.3"), tensors[3].tensor)
    capture.close()


def test_a_plan_that_another_one_replaced_is_not_carried_out() -> None:
    capture, first, then = AsyncCapture(), live(), live()[:2]
    assert capture.prepare(first) is None
    assert capture.prepare(then) is None
    assert capture.obstacle() is None
    assert not capture._memory.fits(first)
    assert capture._memory.fits(then)
    capture.close()
