"""Gradients that a custom loop keeps over a save are named; those that it zeroes before the next batch are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from tests.field.limits import Limit
from tests.trainer.runs import Labelled, Net

KEPT = Limit(
    "gradients that a loop keeps over `save()`, without `accelerator.accumulate`",
    "at the first save",
    "not exact: the next batch adds to gradients that existed when save() was called, and a resumed run starts "
    "without them: call save() after zero_grad(), or call zero_grad() before each backward pass",
)


def _train(folder: Path, zeroed: str) -> dict[str, int]:
    """Returns how many hooks are left on each parameter."""
    accelerator = Accelerator(cpu=True)
    model = Net()
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.SGD(model.parameters(), 1e-2), DataLoader(Labelled(), 4)
    )
    manager = TrainingStateManager(accelerator, folder, signals=())
    for batch in manager.batches(loader):
        if zeroed == "before":
            optimizer.zero_grad()
        elif zeroed == "to zero":
            optimizer.optimizer.zero_grad(set_to_none=False)
        accelerator.backward(model(**batch)["loss"])
        optimizer.step()
        manager.save()
        if zeroed == "after":
            optimizer.zero_grad()
    manager.close()
    return {name: len(one._backward_hooks or ()) for name, one in model.named_parameters()}


@pytest.mark.parametrize("zeroed", ["before", "to zero", "after", "never"])
def test_gradients_that_are_kept_over_a_save_are_named_once(
    zeroed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(_train(tmp_path, zeroed).values()) == {0}
    assert caplog.text.count("gradients that existed when save() was called") == (zeroed == "never")
    if zeroed == "never":
        KEPT.require_told(caplog.text)
