"""Other callbacks at a save: what they write into the checkpoint stays, and reporters that upload it find it there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback
from transformers.integrations import WandbCallback
from transformers.integrations.integration_utils import WandbLogModel

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import problems_of

from .runs import digests, new_trainer, require_same_end


class Writes(TrainerCallback):
    """Adds files to the checkpoint at on_save, as many a callback does that saves adapters."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter.txt").write_text(f"of step {state.global_step}")


@pytest.mark.parametrize("async_save", [True, False])
def test_files_that_a_callback_writes_stay_in_the_checkpoint(async_save: bool, tmp_path: Path) -> None:
    new_trainer(tmp_path, Writes(), LifecycleCallback(async_save=async_save)).train()
    for step in (2, 4, 6):
        checkpoint = tmp_path / f"checkpoint-{step}"
        assert (checkpoint / "adapter" / "adapter.txt").read_text() == f"of step {step}"
        assert "adapter/adapter.txt" not in {entry.path for entry in read_manifest(checkpoint).files}
        assert (checkpoint / "model.safetensors").is_file()
        assert problems_of(checkpoint, full=True) == []


def test_callback_that_answers_to_every_name_finds_the_checkpoint_and_ends_no_training(tmp_path: Path) -> None:
    class Answers(TrainerCallback):
        def __getattr__(self, name: str) -> Any:
            return lambda *given, **named: None

    class Looks(Answers):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(problems_of(tmp_path / f"checkpoint-{state.global_step}", full=True))

    found: list[Any] = []
    new_trainer(tmp_path, Looks(), LifecycleCallback()).train()
    assert found == [[], [], []]


def test_step_that_is_saved_again_has_the_new_files_and_none_of_the_old(tmp_path: Path) -> None:
    def trainer() -> Any:
        return new_trainer(tmp_path, Writes(), LifecycleCallback())

    unbroken = trainer()
    unbroken.train()
    old = tmp_path / "checkpoint-6"
    (old / "stale.txt").write_text("of the run before")
    os.utime(old / "stale.txt", (0, 0))
    (old / "model.safetensors").write_bytes(b"damaged")
    os.utime(old / "model.safetensors", (0, 0))
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert digests(resumed) == digests(unbroken)
    assert (old / "adapter" / "adapter.txt").read_text() == "of step 6"
    assert not (old / "stale.txt").exists()
    assert problems_of(old, full=True) == []


class Uploads(WandbCallback):
    """W&B's own callback, without W&B: it notes what it would upload."""

    def __init__(self, log_model: WandbLogModel) -> None:
        self._log_model = log_model
        self._wandb = None
        self._initialized = False
        self.found: list[bool] = []

    def setup(self, *args: Any, **kwargs: Any) -> None: ...

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((Path(args.output_dir) / f"checkpoint-{state.global_step}" / "optimizer.pt").is_file())

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("on_") and name != "on_save":  # needs W&B itself
            return lambda *args, **kwargs: None
        return super().__getattribute__(name)


def test_reporter_that_uploads_checkpoints_finds_each_of_them_whole(tmp_path: Path, caplog: Any) -> None:
    uploads = Uploads(WandbLogModel.CHECKPOINT)
    new_trainer(tmp_path, uploads, LifecycleCallback()).train()
    assert uploads.found == [True, True, True]


def test_reporter_that_uploads_none_does_not_make_saves_wait(tmp_path: Path, caplog: Any) -> None:
    ours = LifecycleCallback()
    trainer = new_trainer(tmp_path, ours, Uploads(WandbLogModel.FALSE))
    trainer.train()
    assert "every save is waited for" not in caplog.text
    assert trainer.callback_handler.callbacks[-1] is not ours  # nobody was moved


def test_run_with_such_callbacks_resumes_exactly(tmp_path: Path) -> None:
    def trainer(name: str) -> Any:
        return new_trainer(tmp_path / name, Uploads(WandbLogModel.CHECKPOINT), Writes(), LifecycleCallback())

    require_same_end(trainer, step=5)
