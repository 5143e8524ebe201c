"""TensorBoard shows a run that was broken off and resumed as one run, with the values of the unbroken one at each step.

A step that was logged and not saved is trained, and logged, once more; the two points lie on each other. Reporters are
told of a log row before any callback of the user's: the mean loss of the summary row is that of the resumed part there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer.runs import break_off, new_trainer
from transformers import Trainer

from hf_lifecycle import LifecycleCallback

pytest.importorskip("tensorboard")

CLOCK = ("runtime", "per_second", "flos", "lifecycle/")  # the last: what each save took
SUMMARY = "train/train_loss"


def trainer(folder: Path) -> Trainer:
    settings: dict[str, Any] = {"report_to": "tensorboard", "eval_strategy": "steps", "eval_steps": 2, "max_steps": 8}
    return new_trainer(folder, LifecycleCallback(), logging_steps=1, **settings)


def curves(folder: Path) -> dict[str, set[tuple[int, float]]]:
    """What TensorBoard draws: step and value of every scalar but those of the clock."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {
        tag: {(event.step, event.value) for event in events.Scalars(tag)}
        for tag in events.Tags()["scalars"]
        if tag != SUMMARY and not any(word in tag for word in CLOCK)
    }


@pytest.mark.slow
def test_a_resumed_run_continues_its_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def logs(name: str) -> Path:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / name / "logs"))
        return tmp_path / name / "logs"

    whole = logs("whole")
    trainer(tmp_path / "whole").train()
    resumed = logs("broken")
    break_off(trainer(tmp_path / "broken"), step=5)  # step 5 was logged and will be trained again
    again = trainer(tmp_path / "broken")
    again.train(resume_from_checkpoint=True)
    assert len(list(resumed.glob("events.*"))) == 2
    assert curves(resumed) == curves(whole)
    assert sorted(step for step, _ in curves(resumed)["train/loss"]) == list(range(1, 9))
