"""Checkpoints under Trainer: whole or not there, whatever breaks off a save, and otherwise Trainer's own."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import DirectoryInUse, LifecycleCallback, NoUsableCheckpoint, latest_checkpoint
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import problems_of, staging_folder

from .runs import BrokenOff, Rows, break_off, digests, new_trainer, saved_run

BEST = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"], "metric_for_best_model": "loss"}


def unbroken(place: Path, **settings: Any) -> dict[str, str]:
    trainer = new_trainer(place, LifecycleCallback(), **settings)
    trainer.train()
    return digests(trainer)


def resumed(place: Path, **settings: Any) -> dict[str, str]:
    trainer = new_trainer(place, LifecycleCallback(), **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    return digests(trainer)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("*checkpoint-*"))


class FailsInSave(Trainer):
    """A disk that is full at the second save, when most of it is written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device", output_dir)
        super()._save_rng_state(output_dir)


def test_every_checkpoint_is_committed_with_a_manifest_of_all_its_files(tmp_path: Path) -> None:
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert problems_of(checkpoint, full=True) == []
        manifest = read_manifest(checkpoint)
        assert (manifest.step, manifest.world_size) == (step, 1)
        assert {"model.safetensors", "optimizer.pt", "trainer_state.json"} <= {entry.path for entry in manifest.files}
    assert list(staging_folder(tmp_path).iterdir()) == []


def test_files_are_those_of_stock_trainer_and_its_arguments_are_the_users(tmp_path: Path) -> None:
    new_trainer(tmp_path / "ours", LifecycleCallback(), save_total_limit=3).train()
    new_trainer(tmp_path / "stock", save_total_limit=3).train()
    ours, stock = tmp_path / "ours" / "checkpoint-4", tmp_path / "stock" / "checkpoint-4"
    assert {path.name for path in ours.iterdir()} - {path.name for path in stock.iterdir()} == {"lifecycle"}
    args = torch.load(ours / "training_args.bin", weights_only=False)
    assert (args.output_dir, args.save_total_limit) == (str(tmp_path / "ours"), 3)


def test_save_that_fails_leaves_no_torn_checkpoint_and_the_run_goes_on_from_the_one_before(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path / "run", LifecycleCallback(), kind=FailsInSave)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2"]
    assert resumed(tmp_path / "run") == unbroken(tmp_path / "whole")
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_same_trainer_goes_on_after_a_save_that_failed(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(), kind=FailsInSave, save_total_limit=2)
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert trainer.args.output_dir == str(tmp_path)
    trainer.__class__ = Trainer
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.args.output_dir, trainer.args.save_total_limit) == (str(tmp_path), 2)
    assert "_save_checkpoint" not in vars(trainer)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_only_damaged_checkpoints_are_an_error_not_a_start_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved_run(tmp_path)
    for path in (checkpoint, tmp_path / "checkpoint-2"):
        (path / "model.safetensors").write_bytes(b"")
    with pytest.raises(NoUsableCheckpoint):
        latest_checkpoint(tmp_path)
    for _ in range(2):  # the first start moves them aside, and the next one finds none by that name
        caplog.clear()
        trainer = new_trainer(tmp_path, LifecycleCallback())
        assert names(tmp_path) == ["damaged-checkpoint-2", "damaged-checkpoint-4"]
        assert (
            "no intact checkpoint is left to resume from; damaged: damaged-checkpoint-2, damaged-checkpoint-4"
            in caplog.text
        )
        with pytest.raises(NoUsableCheckpoint, match="damaged-checkpoint-4: damaged, and moved aside") as caught:
            latest_checkpoint(tmp_path)
        assert len(caught.value.problems) == 2
        with pytest.raises(ValueError, match="No valid checkpoint found"):  # Trainer's own
            trainer.train(resume_from_checkpoint=True)
    (tmp_path / "damaged-checkpoint-2").rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "damaged-checkpoint-4")
    assert latest_checkpoint(tmp_path) is None


def test_torn_and_whole_checkpoints_of_stock_trainer_are_told_apart(tmp_path: Path) -> None:
    new_trainer(tmp_path).train()
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    new_trainer(tmp_path, LifecycleCallback())
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "damaged-checkpoint-6"]
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_limit_is_kept_after_the_commit_and_never_costs_the_best_or_the_one_resumed_from(tmp_path: Path) -> None:
    settings = {**BEST, "max_steps": 10, "save_total_limit": 1, "load_best_model_at_end": True}
    best = new_trainer(tmp_path / "whole", LifecycleCallback(), **settings)
    best.train()
    assert best.args.save_total_limit == 1
    assert best.state.best_model_checkpoint == str(tmp_path / "whole" / f"checkpoint-{best.state.best_global_step}")
    assert Path(best.state.best_model_checkpoint).is_dir()
    assert len(names(tmp_path / "whole")) <= 2
    break_off(new_trainer(tmp_path / "run", LifecycleCallback(), **settings), step=4)
    again = new_trainer(tmp_path / "run", LifecycleCallback(), **settings)
    again.train(resume_from_checkpoint=True)
    assert digests(again) == digests(best)


class WritesBeside(TrainerCallback):
    """As a user's callback does that keeps a report in the output directory."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report = Path(args.output_dir) / "reports" / f"{state.global_step}.txt"
        report.parent.mkdir(exist_ok=True)
        report.write_text("here")


def test_what_others_write_to_the_output_directory_during_a_save_gets_there(tmp_path: Path) -> None:
    new_trainer(tmp_path, WritesBeside(), LifecycleCallback(), evaluated=Rows(), **BEST).train()
    assert sorted(path.name for path in (tmp_path / "reports").iterdir()) == ["2.txt", "4.txt", "6.txt"]


def test_second_run_in_the_same_directory_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_lifecycle.checkpoint.directory.lock import DirectoryLock\n"
        "DirectoryLock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    file = staging_folder(tmp_path).parent / "lock"
    holder = subprocess.Popen([sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        trainer = new_trainer(tmp_path, LifecycleCallback())  # to evaluate beside a run is no fault
        with pytest.raises(DirectoryInUse, match=f"process {holder.pid} on"):
            trainer.train()
    finally:
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()
    trainer.train()


class AsksLate(TrainerCallback):
    """Comes after ours and asks for a save of its own."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step == 3


def test_save_that_a_later_callback_asks_for_is_in_place_and_can_be_resumed_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    trainer = new_trainer(tmp_path / "run", LifecycleCallback(), AsksLate(), _Break())
    with pytest.raises(BrokenOff):
        trainer.train()
    assert names(tmp_path / "run") == ["checkpoint-2", "checkpoint-3"]
    assert problems_of(tmp_path / "run" / "checkpoint-3", full=True) == []
    end = resumed(tmp_path / "run")
    assert {key: end[key] for key in end if "log" not in key} == {
        key: value for key, value in unbroken(tmp_path / "whole").items() if "log" not in key
    }


class _Break(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise BrokenOff
