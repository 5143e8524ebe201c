"""The output directory is the one that its path meant when training began, whatever happens around it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_lifecycle import KeepLast, LifecycleCallback, TrainingStateManager, latest_checkpoint
from hf_lifecycle.checkpoint.verification import problems_of
from tests.trainer.runs import digests, new_trainer


class Elsewhere(TrainerCallback):
    """Trains each step in another working directory, as code that runs programs or writes files does."""

    def __init__(self, elsewhere: Path, *, comes_back: bool = True) -> None:
        self._elsewhere, self._comes_back = elsewhere, comes_back
        self._before = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = os.getcwd()
        os.chdir(self._elsewhere)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._comes_back:
            os.chdir(self._before)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another directory; the test begins in the folder ``home``."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "elsewhere"


def _names(directory: Path | str) -> list[str]:
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


@pytest.mark.parametrize("comes_back", [True, False], ids=["for a moment", "for good"])
@pytest.mark.parametrize("background", [True, False])
def test_relative_output_dir_stays_where_training_began(background: bool, comes_back: bool, elsewhere: Path) -> None:
    ours = LifecycleCallback(async_save=background, keep=KeepLast(2), mirror=str(elsewhere / "mirror"))
    trainer = new_trainer(Path("out"), Elsewhere(elsewhere, comes_back=comes_back), ours, save_steps=1)
    trainer.train()
    out = elsewhere.parent / "home" / "out"
    assert trainer.args.output_dir == "out"
    assert _names(out) == ["checkpoint-5", "checkpoint-6"]
    assert all(problems_of(out / name, full=True) == [] for name in _names(out))
    assert (out / "lifecycle.jsonl").is_file()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["mirror"]
    assert "checkpoint-6" in _names(elsewhere / "mirror")


def test_best_weights_are_found_from_another_working_directory(elsewhere: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    here = new_trainer(Path("here"), LifecycleCallback(), learning_rate=0.5, **settings)
    here.train()
    there = new_trainer(
        Path("there"), Elsewhere(elsewhere, comes_back=False), LifecycleCallback(), learning_rate=0.5, **settings
    )
    there.train()
    assert digests(there) == digests(here)
    assert there.state.best_model_checkpoint == str(here.state.best_model_checkpoint).replace("here", "there")


def test_latest_checkpoint_means_the_same_from_everywhere(elsewhere: Path) -> None:
    new_trainer(Path("out"), LifecycleCallback(), max_steps=2).train()
    found = latest_checkpoint("out")
    os.chdir(elsewhere)
    assert found is not None
    assert problems_of(Path(found), full=True) == []


def test_home_directory_means_the_same_to_latest_checkpoint_as_to_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = new_trainer(Path("~/out"), LifecycleCallback(), max_steps=2)
    trainer.train()
    assert latest_checkpoint("~/out") == str(tmp_path / "out" / "checkpoint-2")


def test_relative_directory_of_a_loop_stays_where_the_manager_was_made(elsewhere: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    manager = TrainingStateManager(accelerator, "runs/loop", keep_last=1)
    assert manager.resume() is None
    for _ in manager.epochs(2):
        os.chdir(elsewhere)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        manager.save()
    manager.close()
    place = elsewhere.parent / "home" / "runs" / "loop"
    assert len(_names(place)) == 1
    assert latest_checkpoint(place) == str(place / _names(place)[0])
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_new_output_directory_is_flushed_at_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    new_trainer(tmp_path / "a" / "b" / "run", LifecycleCallback(), max_steps=2).train()
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(flushed)
