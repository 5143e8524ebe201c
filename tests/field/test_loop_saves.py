"""Saves of a custom training loop leave the run as it is without them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager


def _weights(folder: Path, every: int, *, wait: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    loader = DataLoader(torch.arange(16.0).reshape(-1, 1), batch_size=2, shuffle=True)
    manager = TrainingStateManager(accelerator, folder, signals=())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    manager.resume()
    for _ in manager.epochs(2):
        for batch in manager.batches(loader):
            accelerator.backward(model(batch).sum())
            optimizer.step()
            optimizer.zero_grad()
            if manager.progress.step % every == 0:
                manager.save(wait=wait)
    manager.close()
    return [one.detach().clone() for one in model.parameters()]


@pytest.mark.parametrize("wait", [True, False])
def test_saving_more_or_less_often_gives_the_same_run(wait: bool, tmp_path: Path) -> None:
    rarely, often = (_weights(tmp_path / str(every), every, wait=wait) for every in (100, 3))
    assert all(map(torch.equal, rarely, often))
