"""What a training tells its event log: the story of its checkpoints, in order, and never at the training's cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_lifecycle import EarlyStopping, LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import LOG_NAME, Event, read_events

from .runs import digests, new_trainer, saved_run

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"]}


def told(place: Path) -> list[tuple[str, object]]:
    return [(event.event, event.facts.get("step")) for event in read_events(place)]


def only(place: Path, name: str) -> list[Event]:
    return [event for event in read_events(place) if event.event == name]


def test_checkpoint_resumed_from_elsewhere_is_told_by_its_whole_path(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path / "old")
    new_trainer(tmp_path / "new", LifecycleCallback()).train(resume_from_checkpoint=str(checkpoint))
    assert [event.facts["path"] for event in only(tmp_path / "new", "resumed")] == [str(checkpoint)]


def test_early_stopping_is_told_once_with_its_reason(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=1, min_delta=100.0)
    new_trainer(tmp_path, LifecycleCallback(early_stopping=stopping), max_steps=12, **EVALUATED).train()
    (stopped,) = only(tmp_path, "stopped")
    assert (stopped.facts["step"], stopped.facts["why"]) == (4, stopping.reason)
    again = new_trainer(
        tmp_path,
        LifecycleCallback(early_stopping=EarlyStopping(patience=1, min_delta=100.0)),
        max_steps=12,
        **EVALUATED,
    )
    again.train(resume_from_checkpoint=latest_checkpoint(tmp_path))
    assert len(only(tmp_path, "stopped")) == 1


def test_what_is_removed_is_told_with_the_reason(tmp_path: Path) -> None:
    new_trainer(tmp_path, LifecycleCallback(), save_total_limit=1).train()
    removed = only(tmp_path, "removed")
    assert [(event.facts["step"], event.facts["path"]) for event in removed] == [
        (2, "checkpoint-2"),
        (4, "checkpoint-4"),
    ]
    assert removed[0].facts["why"] == "not kept by KeepLast(count=1)"


def test_recovery_is_told(tmp_path: Path) -> None:
    (saved_run(tmp_path) / "optimizer.pt").write_bytes(b"")
    new_trainer(tmp_path, LifecycleCallback())
    (recovered,) = only(tmp_path, "recovered")
    assert "checkpoint-4 is damaged" in str(recovered.facts["why"])


class FailsInSave(Trainer):
    """A disk that is full at the second save, when most of it is written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device", output_dir)
        super()._save_rng_state(output_dir)


def test_save_that_fails_is_told_and_raised(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"):
        new_trainer(tmp_path, LifecycleCallback(), kind=FailsInSave).train()
    assert told(tmp_path)[-1] == ("failed", 4)
    assert "No space left" in str(read_events(tmp_path)[-1].facts["why"])


class FailsAtFour:
    """An object whose state cannot be taken at the second save, after Trainer has written its files."""

    def __init__(self) -> None:
        self.asked = 0

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        if self.asked == 2:
            raise RuntimeError("out of reach")
        return {"asked": self.asked}

    def load_state_dict(self, state: Any) -> None:
        self.asked = state["asked"]


def test_save_that_fails_after_trainers_part_is_told_once(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of reach"):
        new_trainer(tmp_path, LifecycleCallback(objects={"far": FailsAtFour()})).train()
    assert told(tmp_path) == [("started", 0), ("saved", 2), ("committed", 2), ("asked", 4), ("failed", 4)]
    assert only(tmp_path, "failed")[0].facts["why"] == "RuntimeError: out of reach"


def test_log_that_cannot_be_written_changes_nothing_but_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trained(place: Path, **settings: Any) -> dict[str, str]:
        trainer = new_trainer(place, LifecycleCallback(), **settings)
        trainer.train()
        return digests(trainer)

    (tmp_path / "blocked" / LOG_NAME).mkdir(parents=True)
    assert trained(tmp_path / "blocked") == trained(tmp_path / "free")
    assert caplog.text.count("events cannot be written") == 1
