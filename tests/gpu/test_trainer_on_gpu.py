"""On an accelerator: the device's generator is restored, and background saves copy from it what Trainer would write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.store import problems_of
from hf_lifecycle.state.rng import capture_rng, restore_rng
from tests.trainer.runs import break_off, digests, new_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def _trainer(place: Path, *, async_save: bool = True) -> Trainer:
    """Dropout on the device, so that its generator decides about every step."""
    return new_trainer(place, LifecycleCallback(async_save=async_save), use_cpu=False, max_steps=10)


def test_state_of_the_devices_generator_comes_back() -> None:
    before = capture_rng()
    drawn = torch.rand(4, device="cuda")
    restore_rng(before)
    assert torch.equal(torch.rand(4, device="cuda"), drawn)


@pytest.mark.parametrize("async_save", [True, False])
def test_broken_off_run_ends_with_the_bits_of_the_unbroken_one(async_save: bool, tmp_path: Path) -> None:
    unbroken = _trainer(tmp_path / "unbroken", async_save=async_save)
    unbroken.train()
    break_off(_trainer(tmp_path / "broken", async_save=async_save), step=7)
    resumed = _trainer(tmp_path / "broken", async_save=async_save)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)


def test_background_checkpoint_has_the_files_and_bytes_of_one_that_trainer_saved(tmp_path: Path) -> None:
    for name, async_save in (("background", True), ("at_once", False)):
        _trainer(tmp_path / name, async_save=async_save).train()
    background, at_once = (tmp_path / name / "checkpoint-8" for name in ("background", "at_once"))
    assert problems_of(background, full=True) == []
    names = {path.name for path in at_once.iterdir()}
    assert {path.name for path in background.iterdir()} == names
    for name in names & {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"}:
        assert (background / name).read_bytes() == (at_once / name).read_bytes(), name
