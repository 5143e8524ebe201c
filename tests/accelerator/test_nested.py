"""Loops over batches within each other: exact where the outer one is saved, and named where the inner one is."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.field.test_loop_passes import SAVED_WITHIN
from tests.resume.cases.tiny import Rows

from .tiny import Script, new_script


def pair(directory: Path, **settings: Any) -> tuple[Script, Any]:
    script = new_script(directory, **{"signals": (), **settings})
    return script, script.accelerator.prepare(DataLoader(Rows(12, seed=5), batch_size=4, shuffle=True))


def run(directory: Path, *, trains_outer: bool, resume: Path | None = None) -> tuple[list[float], dict[str, str]]:
    """Two epochs of 6 outer batches, 3 inner ones for each; saved after every second outer one."""
    script, inner = pair(directory)
    manager, seen = script.manager, []
    manager.resume(resume)
    for _ in manager.epochs(2):
        for number, batch in enumerate(manager.batches(script.loader)):
            for other in manager.batches(inner):
                script.train(other)
                seen.append(float(other["labels"].sum()))
            if trains_outer:
                script.train(batch)
            seen.append(float(batch["labels"].sum()))
            if number % 2 == 1:
                manager.save()
    manager.close()
    return seen, script.digests()


@pytest.mark.parametrize("trains_outer", [True, False])
def test_nested_loops_saved_in_the_outer_body_go_on_exactly(trains_outer: bool, tmp_path: Path) -> None:
    whole, digests = run(tmp_path / "whole", trains_outer=trains_outer)
    assert len(set(whole)) > 12  # the inner loader is shuffled anew for each outer batch
    for bodies in (2, 6, 8):  # in the first epoch, after its last batch, and in the second
        step = bodies * (4 if trains_outer else 3)
        rest, resumed = run(
            tmp_path / f"from {step}", trains_outer=trains_outer, resume=tmp_path / "whole" / f"checkpoint-{step}"
        )
        assert rest == whole[4 * bodies :]
        assert resumed == digests


def test_save_in_the_inner_body_is_named_when_the_inner_loop_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script, inner = pair(tmp_path)
    manager = script.manager
    outer = manager.batches(script.loader)
    next(outer)
    others = manager.batches(inner)
    for _ in range(3):
        script.train(next(others))
        manager.save()
    next(outer)
    SAVED_WITHIN.require_told(caplog.text)
    assert caplog.text.count("save() at step 1 was called in the body of a batch of loader 0, and loader 1 is") == 1
    assert caplog.text.count("is iterated further") == 1


def test_loop_begun_after_a_save_in_one_body_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script, inner = pair(tmp_path)
    manager = script.manager
    batches = manager.batches(script.loader)
    script.train(next(batches))
    manager.save()
    script.train(next(manager.batches(inner)))
    script.train(next(batches))
    assert "loader 1 is iterated further in the same body" in caplog.text


def test_iterators_that_take_turns_train_to_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which of them is the outer one is not told by the program."""
    script, inner = pair(tmp_path)
    for _ in script.manager.epochs(2):
        turns = [iter(script.manager.batches(script.loader)), iter(script.manager.batches(inner))]
        while turns:
            one = turns.pop(0)
            for batch in one:
                script.train(batch)
                script.manager.save()
                turns.append(one)
                break
    assert script.manager.progress.step == 18
    SAVED_WITHIN.require_told(caplog.text)


def test_signal_in_an_inner_body_is_heeded_when_the_outer_one_is_done(tmp_path: Path) -> None:
    script, inner = pair(tmp_path, signals=("SIGTERM",), on_preempt="return")
    manager, bodies = script.manager, 0
    for _ in manager.epochs(2):
        for _batch in manager.batches(script.loader):
            for other in manager.batches(inner):
                script.train(other)
                if manager.progress.step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
            bodies += 1
    assert (manager.progress.preempted, manager.progress.step, bodies) == ("SIGTERM", 3, 1)
    assert (tmp_path / "checkpoint-3").is_dir()
    manager.close()


def test_limit_within_an_inner_loop_is_said_not_to_go_on_exactly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script, inner = pair(tmp_path)
    for _ in script.manager.epochs(2, max_steps=2):
        for _batch in script.manager.batches(script.loader):
            for other in script.manager.batches(inner):
                script.train(other)
    assert "max_steps ended the loop over loader 1 within another loop over batches" in caplog.text
