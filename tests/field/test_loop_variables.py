"""What a custom loop keeps in its own variables, and what of its data it changes, goes on after a resume."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, WeightedRandomSampler

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from tests.trainer.runs import BrokenOff, Labelled, Net

NUMBERS = np.random.default_rng(5)
Factor = Callable[[], float]


def _draw() -> float:
    return float(NUMBERS.random())


def _train(folder: Path, kept: str, *, changed: str = "", break_at: int | None = None) -> dict[str, str]:
    """A loop of 8 steps, 4 to an epoch, that saves every 2; its loss depends on what is ``kept``."""
    NUMBERS.bit_generator.state = np.random.default_rng(5).bit_generator.state
    set_seed(7)
    accelerator = Accelerator(cpu=True)
    dataset = Labelled()
    order = WeightedRandomSampler(torch.ones(16), 16) if "weights" in changed else None
    model, own = Net(), DataLoader(dataset, 4, shuffle=order is None, sampler=order)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 1e-2), own)
    numbers, average, calls = random.Random(3), torch.zeros(4), torch.zeros(())

    def counted() -> float:
        return float(calls.add_(1))

    factors: dict[str, Factor] = {"module": _draw, "local": numbers.random, "closure": counted}
    manager = TrainingStateManager(accelerator, folder)
    manager.resume()
    for _ in manager.epochs(2):
        if changed == "labels":
            dataset.values = [random.random() for _ in dataset.values]
        elif changed == "order":
            random.shuffle(dataset.order)
        elif changed == "weights" and order is not None:
            order.weights.mul_(torch.rand(16, dtype=torch.float64))
        for batch in manager.batches(loader):
            factor = factors[kept]() if kept in factors else 1.0 + float(average.mean())
            accelerator.backward(model(**batch)["loss"] * factor)
            optimizer.step()
            optimizer.zero_grad()
            if kept == "tensor":
                average.lerp_(batch["x"].mean(dim=0), 0.1)
            if changed == "weights amid an epoch" and order is not None:
                order.weights.mul_(torch.rand(16, dtype=torch.float64))
            if manager.progress.step % 2 == 0:
                manager.save()
            if manager.progress.step == break_at:
                manager.close()
                raise BrokenOff
    manager.close()
    return {name: tensor_digest(one) for name, one in module_tensors(model).items()}


@pytest.mark.parametrize(
    ("kept", "changed"),
    [(kept, "") for kept in ("module", "local", "closure", "tensor")]
    + [("", changed) for changed in ("labels", "order", "weights")],
)
def test_loop_goes_on_with_what_it_kept(
    kept: str, changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _train(tmp_path / "whole", kept, changed=changed)
    for step in (3, 6, 7):
        place = tmp_path / f"broken off at {step}"
        with pytest.raises(BrokenOff):
            _train(place, kept, changed=changed, break_at=step)
        assert _train(place, kept, changed=changed) == whole, place
    assert "not exact" not in caplog.text


def test_order_that_is_changed_amid_an_epoch_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train(tmp_path, "", changed="weights amid an epoch")
    assert "not exact: loader 0.sampler.sampler.weights changes during training" in caplog.text
