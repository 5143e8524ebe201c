"""A loop on accelerate whose checkpoints are copied to a second place, loses its disk, and goes on from there."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.checkpoint.directory.events import read_events
from tests.mirror.runs import fresh_url


def train(directory: Path, url: str | None, *, until: int = 3) -> list[torch.Tensor]:
    """A tiny loop, saved at each epoch's end; the weights it ends with."""
    torch.manual_seed(3)
    accelerator = Accelerator(cpu=True)
    model: torch.nn.Module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 1))
    rows = torch.linspace(-1, 1, 64).reshape(16, 4)
    loader = DataLoader(TensorDataset(rows), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters()), loader)
    manager = TrainingStateManager(accelerator, directory, mirror=url, keep_last=1)
    manager.resume()
    for epoch in manager.epochs(3):
        if epoch == until:
            break
        for (batch,) in manager.batches(loader):
            loss = model(batch).square().mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        manager.save()
    manager.close()
    accelerator.free_memory()
    return [parameter.detach().clone() for parameter in model.parameters()]


def test_loop_whose_disk_is_lost_goes_on_from_the_mirror(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", None)
    url = fresh_url("memory", tmp_path)
    train(tmp_path / "out", url, until=2)
    assert [event.facts["step"] for event in read_events(tmp_path / "out") if event.event == "mirrored"][-1] == 8
    shutil.rmtree(tmp_path / "out")
    resumed = train(tmp_path / "out", url)
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    first = read_events(tmp_path / "out")[0]
    assert (first.event, first.facts["step"]) == ("resumed", 8)


def test_mirror_without_directory_or_accelerator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give accelerator="):
        TrainingStateManager(mirror=tmp_path)
    with pytest.raises(ValueError, match="directory="):
        TrainingStateManager(Accelerator(cpu=True), mirror=tmp_path)
