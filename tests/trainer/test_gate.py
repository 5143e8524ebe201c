"""Nothing of a checkpoint is loaded before it is verified, whichever way it is named, and it is read only once."""

from __future__ import annotations

import gc
import os
import pickle
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_lifecycle import DamagedCheckpoint, LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory import verification
from hf_lifecycle.checkpoint.directory.events import read_events

from .runs import Rows, new_trainer, saved_run

FILES = (
    "model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "training_args.bin",
    "trainer_state.json",
    "lifecycle/rank-00000.safetensors",
    "lifecycle/manifest.json",
)


class Loads(Trainer):
    """Notes what it loads."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.loaded: list[str] = []
        super().__init__(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.loaded.append(Path(resume_from_checkpoint).name)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def flip(file: Path) -> None:
    """One bit, with the times that the file had."""
    status, content = file.stat(), bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saved_run(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("name", FILES)
def test_damaged_file_of_a_checkpoint_given_by_its_path_is_found_before_trainer_loads_anything(
    run: Path, tmp_path: Path, name: str
) -> None:
    flip(run / "checkpoint-4" / name)
    trainer = new_trainer(tmp_path / "other", LifecycleCallback(), kind=Loads)
    before = digests_of_model(trainer)
    called = "edited since it was saved" if name == "trainer_state.json" else "damaged"  # it is still JSON
    with pytest.raises(DamagedCheckpoint, match=f"{called}, and nothing of it was loaded") as caught:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert any(name in problem for problem in caught.value.problems)
    assert caught.value.newest == run / "checkpoint-2"
    assert f"use {run / 'checkpoint-2'}" in str(caught.value)
    assert (trainer.loaded, digests_of_model(trainer)) == ([], before)  # type: ignore[attr-defined]
    skipped = [event for event in read_events(run) if event.event == "skipped"]
    assert [event.facts["path"] for event in skipped] == ["checkpoint-4"]


def digests_of_model(trainer: Trainer) -> dict[str, str]:
    return {name: str(tensor.tolist()) for name, tensor in trainer.model.state_dict().items()}


def test_older_damaged_checkpoint_of_the_same_directory_is_refused_and_the_newest_is_named(run: Path) -> None:
    flip(run / "checkpoint-2" / "optimizer.pt")
    trainer = new_trainer(run, LifecycleCallback(), kind=Loads)
    with pytest.raises(DamagedCheckpoint, match=r"use .*checkpoint-4, the newest intact checkpoint"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.loaded == []  # type: ignore[attr-defined]


def test_checkpoint_that_was_moved_aside_is_named_as_such(run: Path) -> None:
    flip(run / "checkpoint-4" / "optimizer.pt")
    trainer = new_trainer(run, LifecycleCallback())
    with pytest.raises(DamagedCheckpoint, match="moved to damaged-checkpoint-4"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_callback_added_later_finds_the_damage_before_anything_of_ours_is_loaded(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(tmp_path / "other", kind=Loads)
    trainer.add_callback(LifecycleCallback())
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert "before it could be verified" in caplog.text
    caplog.clear()
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))  # from then on it is there in time
    assert "before it could be verified" not in caplog.text
    flip(run / "checkpoint-4" / "scheduler.pt")
    late = new_trainer(tmp_path / "other", kind=Loads)
    late.add_callback(LifecycleCallback())
    with pytest.raises(DamagedCheckpoint, match=r"scheduler\.pt: digest differs"):
        late.train(resume_from_checkpoint=str(run / "checkpoint-4"))


def test_callback_that_was_removed_stands_in_no_way(run: Path, tmp_path: Path) -> None:
    flip(run / "checkpoint-4" / "rng_state.pth")
    trainer = new_trainer(tmp_path / "other", LifecycleCallback(), kind=Loads, max_steps=4)
    trainer.remove_callback(LifecycleCallback)
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert trainer.loaded == ["checkpoint-4"]  # type: ignore[attr-defined]


def test_damaged_best_model_is_not_loaded_at_the_end(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"], "load_best_model_at_end": True}
    in_loop = LifecycleCallback(async_save=False)  # so that there is something to flip before it is loaded
    trainer = new_trainer(tmp_path, in_loop, evaluated=Rows(16), kind=FlipsBest, **best)
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint-6/model\.safetensors: digest differs"):
        trainer.train()
    assert caught_up(trainer) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def caught_up(trainer: Trainer) -> list[str]:
    return sorted(path.name for path in Path(str(trainer.args.output_dir)).glob("checkpoint-*"))


class FlipsBest(Trainer):
    def store_flos(self) -> None:
        super().store_flos()
        best = self.state.best_model_checkpoint
        if best is not None and best.endswith("checkpoint-6") and "staging" not in best:
            flip(Path(best) / "model.safetensors")


def test_start_reads_a_checkpoint_once_and_the_next_start_reads_it_again(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(1.1)  # files of the last second are read each time
    read: list[str] = []
    digest = verification.digest_file

    def counted(path: Path, *more: Any) -> str:
        read.append(path.name)
        return digest(path, *more)

    monkeypatch.setattr(verification, "digest_file", counted)
    found = latest_checkpoint(run)
    once = len(read)
    assert len(set(read)) == once > 5
    trainer = new_trainer(run, LifecycleCallback())
    trainer.train(resume_from_checkpoint=found)
    assert len(read) == once
    latest_checkpoint(run)
    assert len(read) > once


def test_change_after_verifying_is_found_whatever_the_times_say(run: Path) -> None:
    time.sleep(1.1)
    assert latest_checkpoint(run) == str(run / "checkpoint-4")
    flip(run / "checkpoint-4" / "optimizer.pt")
    assert latest_checkpoint(run) == str(run / "checkpoint-2")


def test_trainer_is_freed_without_the_collector_and_pickled_as_before(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback())
    copy = pickle.loads(pickle.dumps(trainer))
    assert vars(copy)["_load_from_checkpoint"]._trainer() is copy
    gone = weakref.ref(trainer)
    gc.disable()
    try:
        del trainer
        assert gone() is None
    finally:
        gc.enable()
