"""Where a transformers lacks a name that is relied on, what is lost is said, and training goes the plain way."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.hosts.trainer.intercept import LOOP, RELIED_ON, report_missing_names
from tests.field.renaming import renamed
from tests.trainer.runs import break_off, digests, new_trainer

# Others than Trainer know these too.
_NOT_RENAMED = {"resume_from_checkpoint", "train_dataloader", "model", "trial", "ignore_keys_for_eval"}
_NOT_RENAMED |= {"learning_rate"}
_NAMES = [name for row in RELIED_ON for name in row if name not in _NOT_RENAMED]
_SAYS = "this Trainer lacks names that hf_lifecycle relies on"


class _Signals(TrainerCallback):
    """Sends a signal as the step after ``step`` begins."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    trainer = new_trainer(tmp_path_factory.mktemp("unbroken"), LifecycleCallback(), max_steps=6)
    trainer.train()
    return digests(trainer)


def _break_off_and_resume(place: Path) -> dict[str, str]:
    break_off(new_trainer(place, LifecycleCallback(), max_steps=6), step=5)
    trainer = new_trainer(place, LifecycleCallback(), max_steps=6)
    trainer.train(resume_from_checkpoint=True)
    return digests(trainer)


@pytest.mark.core
def test_this_transformers_has_all_that_is_relied_on(
    tmp_path: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    assert _break_off_and_resume(tmp_path) == unbroken
    assert _SAYS not in caplog.text


@pytest.mark.parametrize("name", _NAMES)
def test_missing_name_is_said_and_the_run_ends_the_same(
    name: str, tmp_path: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with renamed(name):
        resumed = _break_off_and_resume(tmp_path)
    assert resumed == unbroken
    assert caplog.text.count(_SAYS) == 2  # once for each training
    assert caplog.text.count(f"no {name}: ") == 2


@pytest.mark.parametrize("name", [name for row in RELIED_ON for name in row])
def test_each_name_is_looked_for(name: str, caplog: pytest.LogCaptureFixture) -> None:
    report_missing_names(object(), {other for row in RELIED_ON for other in row} - {name})
    assert caplog.text.count("\n  no ") == 1
    assert f"no {name}: " in caplog.text


def test_checkpoint_is_whole_where_the_loop_has_another_name(tmp_path: Path) -> None:
    with renamed(LOOP):
        before = break_off(new_trainer(tmp_path / "before", LifecycleCallback(), max_steps=6), step=5)
        assert before.is_in_train  # an error leaves it so, and only one of the two trains from here on
        break_off(new_trainer(tmp_path / "run", LifecycleCallback(), max_steps=6), step=5)
    found = list((tmp_path / "run").glob("checkpoint-*"))
    assert found
    assert all(manifest_path(one).is_file() for one in found)


def test_signal_ends_training_with_a_save_where_the_loop_has_another_name(tmp_path: Path) -> None:
    callback = LifecycleCallback(signals=["SIGUSR1"], on_preempt="return")
    with renamed(LOOP):
        trainer = new_trainer(tmp_path, callback, max_steps=6)
        trainer.add_callback(_Signals(2))
        trainer.train()
    assert callback.preempted
    assert trainer.state.global_step == 3
    assert manifest_path(tmp_path / "checkpoint-3").is_file()


def test_best_model_is_loaded_from_a_whole_save_where_nothing_can_wait_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    unbroken = new_trainer(tmp_path / "unbroken", LifecycleCallback(), max_steps=6, **wanted)
    unbroken.train()
    with renamed("_load_best_model"):
        without = new_trainer(tmp_path / "without", LifecycleCallback(), max_steps=6, **wanted)
        without.train()
    assert digests(without) == digests(unbroken)
    assert "the checkpoints are the same: Trainer has no _load_best_model" in caplog.text
