"""A program that catches what ends its training and resumes, with its own count of attempts, comes to an end."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.field.limits import Limit
from tests.trainer.runs import new_trainer

RAISED_AGAIN = Limit(
    what="A program resumes in the same process, for the second time from one checkpoint, what its own code has ended",
    when="at the resume",
    line=(
        "not exact: resumed a second time from the checkpoint after which your code raised an error; these values "
        "keep their present state instead of the saved one, since the error would repeat forever otherwise: …"
    ),
)


class Retried(TrainerCallback):
    """Gives up its first attempts."""

    def __init__(self) -> None:
        self.attempts = 0

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attempts += 1

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3 and self.attempts < 3:
            raise RuntimeError("not yet")


def test_count_of_attempts_grows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, raised = new_trainer(tmp_path, Retried(), LifecycleCallback()), 0
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        while raised < 6:
            try:
                trainer.train(resume_from_checkpoint=True if raised else None)
                break
            except RuntimeError:
                raised += 1
    assert trainer.state.global_step == 6
    RAISED_AGAIN.require_told(caplog.text)
