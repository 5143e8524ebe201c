"""Which place of a loop is saved, and which only seems to be; a save that fails leaves the loop as it was."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of
from tests.resume.cases.tiny import Rows
from tests.saving.failing import fail_writes
from tests.trainer.test_save_failures import files_of_at_most

from .tiny import Counter, Script, new_script


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


def goes_on_as(calm: Script, directory: Path) -> bool:
    """Whether the same program, started again, ends as the one that no signal reached."""
    again = train(new_run(directory))
    again.manager.close()
    return again.digests() == calm.digests()


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
    assert caplog.text.count("checkpoint-4: not saved: OSError") == 1


def test_step_that_was_saved_elsewhere_is_saved_when_a_signal_comes(tmp_path: Path) -> None:
    def save(script: Script, step: int) -> None:
        if step == 2:
            script.manager.save()
        elif step == 4:
            script.accelerator.save_state(str(tmp_path / "elsewhere"))

    def save_and_end(step: int) -> None:
        save(script, step)
        if step == 4:
            terminate()

    calm = new_run(tmp_path / "calm")
    train(calm, lambda step: save(calm, step)).manager.close()
    script = new_run(tmp_path / "run")
    train(script, save_and_end).manager.close()
    assert whole_steps(tmp_path / "run") == [4, 2]
    assert goes_on_as(calm, tmp_path / "run")


def test_step_that_was_saved_before_another_checkpoint_was_loaded_is_saved_when_a_signal_comes(tmp_path: Path) -> None:
    script = new_run(tmp_path)
    train(script, lambda step: script.manager.save() if step in (2, 4) else None, epochs=1)
    script.manager.resume(tmp_path / "checkpoint-2")
    script.optimizer.param_groups[0]["lr"] = 0.5
    train(script, lambda step: terminate() if step == 4 else None)
    script.manager.close()
    assert whole_steps(tmp_path) == [4, 2]
    again = new_run(tmp_path)
    assert (again.digests(), again.optimizer.param_groups[0]["lr"]) == (script.digests(), 0.5)
    again.manager.close()


@pytest.mark.parametrize("what", ["the epoch goes on", "an object changes", "the inner loop goes on"])
def test_save_that_failed_and_was_caught_leaves_the_loop_as_it_was(what: str, tmp_path: Path) -> None:
    counter = Counter()
    script = new_run(tmp_path, objects={"counter": counter})

    def fail() -> None:
        with files_of_at_most(4000), pytest.raises(Exception, match="File too large"):
            script.manager.save()

    other = DataLoader(Rows(), batch_size=8)
    for _ in script.manager.epochs(1):
        for number, batch in enumerate(script.manager.batches(script.loader)):
            script.train(batch)
            if what == "the inner loop goes on" and number == 0:
                for inner in script.manager.batches(other):
                    script.train(inner)
                    fail()
        if what != "the inner loop goes on":
            fail()
        counter.count += what == "an object changes"
        if what == "the epoch goes on":
            assert len(list(script.manager.batches(other))) == 3
    script.manager.save()
    script.manager.close()
    assert whole_steps(tmp_path) == [script.manager.progress.step]


def test_loop_that_prepares_no_model_resumes(tmp_path: Path) -> None:
    def script() -> Script:
        made = new_script(tmp_path)
        made.accelerator.free_memory()
        made.optimizer = made.accelerator.prepare(made.optimizer.optimizer)
        made.loader = made.accelerator.prepare(made.loader.base_dataloader)
        return made

    script().run(save_at=(3,), stop_at=3)
    assert script().manager.resume()
