"""The examples of the documentation run as they are printed."""

from __future__ import annotations

import random
import re
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

PAGE = Path(__file__).parent.parent / "docs" / "training_state.rst"


def code_blocks(text: str) -> list[str]:
    """The Python blocks of a page, in its order."""
    blocks = re.findall(r"^\.\. code-block:: python\n\n((?:(?:   .*|\s*)\n)+)", text, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


class Broken(Exception):
    """The moment at which a run is broken off."""


class Stage:
    """A tiny real training: what the examples take as given."""

    def __init__(self, break_before_epoch: int | None = None) -> None:
        random.seed(7)
        np.random.seed(7)
        torch.manual_seed(7)
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.inputs = torch.linspace(-1, 1, 64).reshape(16, 4)
        self.trained = 0
        self.break_before_epoch = break_before_epoch

    def train_one_epoch(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> float:
        if self.trained == self.break_before_epoch:
            raise Broken
        self.trained += 1
        model.train()
        order = torch.randperm(16)
        random.shuffle(rows := order.tolist())
        for start in range(0, 16, 4):
            batch = self.inputs[rows[start : start + 4]]
            noisy = batch + torch.from_numpy(np.random.normal(0, 0.1, batch.shape)).float()
            loss = (model(noisy) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item()

    def validate(self, model: torch.nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return (model(self.inputs) - self.inputs.sum(1, keepdim=True)).square().mean().item()

    def names(self) -> dict[str, Any]:
        return {
            "torch": torch,
            "model": self.model,
            "optimizer": self.optimizer,
            "train_one_epoch": self.train_one_epoch,
            "validate": self.validate,
            "num_epochs": 14,
            "steps_per_epoch": 4,
            "current_loss": 0.4,
        }

    def bits(self) -> list[bytes]:
        tensors = [*self.model.state_dict().values()]
        tensors += [v for entry in self.optimizer.state_dict()["state"].values() for v in entry.values()]
        draws = torch.rand(2).numpy().tobytes() + np.random.rand(2).tobytes() + repr(random.random()).encode()
        return [tensor.numpy().tobytes() for tensor in tensors] + [draws]


@pytest.fixture
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: str, names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_every_example_of_the_training_state_page_runs_as_printed(in_empty_folder, capsys):
    blocks = code_blocks(PAGE.read_text())
    assert len(blocks) == PAGE.read_text().count("code-block:: python") == 8
    names = Stage().names()
    for block in blocks:
        run(block, names)
    printed = capsys.readouterr().out
    assert "custom_state['ema']['fn']" in printed
    assert "Starting fresh training" in printed
    assert names["new_early_stop"].state_dict() is not None


@pytest.mark.parametrize("breaks", [(3,), (1, 5), (2, 2, 2)])
def test_the_whole_loop_broken_off_ends_with_the_same_bits(in_empty_folder, monkeypatch, capsys, breaks):
    block = code_blocks(PAGE.read_text())[-1]
    unbroken = Stage()
    best = run(block, unbroken.names())["state_mgr"].state_dict()
    expected = unbroken.bits()

    other = in_empty_folder / "broken"
    other.mkdir()
    monkeypatch.chdir(other)
    for epochs in breaks:
        with pytest.raises(Broken):
            run(block, Stage(break_before_epoch=epochs).names())
    last = Stage()
    names = run(block, last.names())
    assert f"Resuming from epoch {sum(breaks)}" in capsys.readouterr().out
    assert last.bits() == expected
    assert names["state_mgr"].state_dict() == best
