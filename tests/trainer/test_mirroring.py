"""A training whose checkpoints are copied to a second place, loses its disk, and goes on from there."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import KeepLast, LifecycleCallback, Mirror, latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.saving.files import direct
from tests.trainer.runs import digests, new_trainer

NAMES = "checkpoint-*"  # a callback whose code has it would be waited for, as one that names this attribute
BEST = "best_model_checkpoint"


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(NAMES))


def mirrored(directory: Path) -> list[int]:
    return [int(event.facts["step"]) for event in read_events(directory) if event.event == "mirrored"]


class Waits(TrainerCallback):
    """Lets each copy be done before training goes on, so that none is skipped."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        out, deadline = Path(args.output_dir), time.monotonic() + 20
        while not set(steps_in(out)[-1:]) <= set(mirrored(out)):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_mirror_that_fails_is_told_and_training_ends_as_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = new_trainer(tmp_path / "whole", LifecycleCallback())
    whole.train()
    mirror = Mirror(str(tmp_path / "not" / "mounted"), wait_seconds=0.2)
    with caplog.at_level(logging.WARNING):
        trainer = new_trainer(tmp_path / "out", LifecycleCallback(mirror=mirror))
        trainer.train()
    assert digests(trainer) == digests(whole)
    assert steps_in(tmp_path / "out") == [2, 4, 6]
    assert "checkpoint-6 is NOT at" in caplog.text
    assert f"no checkpoint is copied to {mirror.url} until" in caplog.messages[0]
    assert any(event.event == "mirror_failed" for event in read_events(tmp_path / "out"))


def test_mirror_that_is_the_output_directory_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "out")
    trainer = new_trainer(tmp_path / "out", LifecycleCallback(mirror=tmp_path / "link"))
    with pytest.raises(ValueError, match="link is the output directory itself"):
        trainer.train()
    assert trainer.state.global_step == 0
    with pytest.raises(ValueError, match="link is the output directory itself"):
        latest_checkpoint(tmp_path / "out", mirror=tmp_path / "link")


def test_mirror_may_keep_more_than_the_output_directory_and_never_loses_the_best(tmp_path: Path) -> None:
    drive = tmp_path / "drive"
    callback = LifecycleCallback(keep=KeepLast(1), mirror=drive)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "learning_rate": 0.0}
    trainer = new_trainer(tmp_path / "out", Waits(), callback, load_best_model_at_end=True, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 2  # nothing is learned, so the first stays the best
    assert steps_in(tmp_path / "out") == steps_in(drive) == [2, 6]


class MovesTheBest(TrainerCallback):
    """Names another best checkpoint in the step after the save of step 4, whose writing waits for it."""

    def __init__(self) -> None:
        self.moved = threading.Event()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            self.best = getattr(state, BEST)
            setattr(state, BEST, None)
            self.moved.set()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            out, deadline = Path(args.output_dir), time.monotonic() + 20
            while 4 not in mirrored(out):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            setattr(state, BEST, self.best)


def test_best_of_the_moment_of_a_background_save_stays_at_the_mirror_though_it_is_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive, moves, real = tmp_path / "drive", MovesTheBest(), direct.write_whole

    def write(descriptor: int, data: Any) -> None:
        assert moves.moved.wait(20)
        real(descriptor, data)

    monkeypatch.setattr(direct, "write_whole", write)
    callback = LifecycleCallback(keep=KeepLast(1), mirror=drive)
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss", "learning_rate": 0.0}
    new_trainer(tmp_path / "out", Waits(), moves, callback, **settings).train()
    assert moves.moved.is_set()
    assert 2 in steps_in(drive)  # nothing is learned, so the first stays the best


def test_wrong_mirror_is_refused_before_training() -> None:
    with pytest.raises(TypeError, match="mirror"):
        LifecycleCallback(mirror=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chained"):
        LifecycleCallback(mirror="simplecache::s3://bucket/x")
    assert "drive" in repr(LifecycleCallback(mirror="/drive"))
