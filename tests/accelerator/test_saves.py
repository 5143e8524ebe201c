"""Which place of a loop is saved, and which only seems to be; a save that fails leaves the loop as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle.checkpoint.store import checkpoints_in, problems_of
from tests.saving.failing import fail_writes

from .tiny import Script, new_script


def new_run(directory: Path, **settings: Any) -> Script:
    script = new_script(directory, generators=11, on_preempt="return", **settings)
    script.manager.resume()
    return script


def train(script: Script, then: Callable[[int], object] = lambda step: None, *, epochs: int = 2) -> Script:
    """6 steps an epoch; ``then`` is last in a batch's body."""
    for _ in script.manager.epochs(epochs):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            then(script.manager.progress.step)
    return script


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def whole_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints, newest first, each of them whole."""
    found = checkpoints_in(directory)
    assert [problems_of(path, full=True) for _, path in found] == [[]] * len(found)
    return [step for step, _ in found]


def test_save_in_the_background_that_failed_before_costs_no_signals_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_writes(monkeypatch)
    script = new_run(tmp_path)

    def save_and_end(step: int) -> None:
        if step in (2, 4):
            script.manager.save(wait=False)
        elif step == 5:
            terminate()

    train(script, save_and_end).manager.close()
    assert script.manager.progress.preempted == "SIGTERM"
    assert whole_steps(tmp_path) == [5, 2]
    assert caplog.text.count("checkpoint-4 was not saved: OSError") == 1
