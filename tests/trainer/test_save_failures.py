"""A save that fails and a training that, by choice, goes on: said, nothing lost, and the run has the same bits."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from transformers import Trainer

from hf_lifecycle import LifecycleCallback, SaveFailed, UnsafeStateError
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import problems_of, staging_folder
from hf_lifecycle.checkpoint.files.write_errors import is_write_fault
from tests.saving.failing import fail_writes

from .runs import Rows, digests, new_trainer

resource = pytest.importorskip("resource", reason="needs POSIX limits")

FAILS = 4  # the step whose save fails


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond ``size`` bytes: a write that would is refused by the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class WeightsDoNotFit(Trainer):
    def save_model(self, *given: Any, **named: Any) -> None:
        with files_of_at_most(100 if self.state.global_step == FAILS else resource.RLIM_INFINITY):
            super().save_model(*given, **named)


class OptimizerDoesNotFit(Trainer):
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with files_of_at_most(500 if self.state.global_step == FAILS else resource.RLIM_INFINITY):
            super()._save_optimizer_and_scheduler(output_dir)


@contextmanager
def not_permitted(folder: Path) -> Iterator[None]:
    """Nothing may be made in ``folder``; for root, whom no mode stops, as another user."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        folder.chmod(0o755)


class WeightsAreNotPermitted(Trainer):
    def save_model(self, output_dir: Any = None, **named: Any) -> None:
        with not_permitted(Path(output_dir).parent) if self.state.global_step == FAILS else nullcontext():
            super().save_model(output_dir, **named)


class StateDoesNotFit(Trainer):
    """Around our part of the save."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step == FAILS:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        with files_of_at_most(resource.RLIM_INFINITY):
            super()._save_checkpoint(*given, **named)


class ManifestHasNoPlace(Trainer):
    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step == FAILS:
            (Path(output_dir) / "lifecycle" / "manifest.json").mkdir(parents=True)


PLACES = {
    WeightsDoNotFit: "model.safetensors: .*File too large",
    WeightsAreNotPermitted: "Permission denied: ",
    OptimizerDoesNotFit: "optimizer.pt: .*(inline_container|iostream|File too large)",
    StateDoesNotFit: "rank-00000.safetensors.*File too large|File too large.*rank-00000.safetensors",
    ManifestHasNoPlace: "Is a directory.*manifest.json",
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    trainer = new_trainer(tmp_path_factory.mktemp("unbroken"), LifecycleCallback())
    trainer.train()
    return digests(trainer) | {"log": str(rows(trainer))}


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    """The log less what a clock wrote."""
    log = trainer.state.log_history
    return [{k: v for k, v in row.items() if not k.endswith(("_runtime", "_per_second"))} for row in log]


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.mark.parametrize("kind", PLACES)
def test_training_goes_on_after_a_failed_save_and_ends_with_the_same_bits(
    kind: type[Trainer], tmp_path: Path, unbroken: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    in_loop = LifecycleCallback(on_save_failure="continue", async_save=False)
    trainer = new_trainer(tmp_path, in_loop, kind=kind)
    trainer.train()
    assert digests(trainer) | {"log": str(rows(trainer))} == unbroken
    assert names(tmp_path) == [".lifecycle", "checkpoint-2", "checkpoint-6", "lifecycle.jsonl"]
    assert list(staging_folder(tmp_path).iterdir()) == []
    for step in (2, 6):
        assert problems_of(tmp_path / f"checkpoint-{step}", full=True) == []
    (said,) = [record.getMessage() for record in caplog.records if ": not saved: " in record.getMessage()]
    assert f"checkpoint-{FAILS}" in said
    assert "the newest checkpoint is checkpoint-2" in said
    assert re.search(PLACES[kind], said), said
    told = [(event.event, event.facts["step"]) for event in read_events(tmp_path)]
    assert told.count(("failed", FAILS)) == 1
    assert [step for event, step in told if event == "committed"] == [2, 6]


@pytest.mark.parametrize("kind", PLACES)
def test_without_that_choice_the_error_is_raised_and_the_directory_is_as_it_was(
    kind: type[Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(async_save=False), kind=kind)
    with pytest.raises((OSError, RuntimeError, SafetensorError)) as caught:
        trainer.train()
    assert is_write_fault(caught.value)
    assert names(tmp_path) == [".lifecycle", "checkpoint-2", "lifecycle.jsonl"]
    assert list(staging_folder(tmp_path).iterdir()) == []
    assert caplog.text.count(str(caught.value)) == caplog.text.count("checkpoint-4: not saved: ") == 1
    if sys.version_info >= (3, 11):
        (note,) = caught.value.__notes__
        assert "checkpoint-4: not saved" in note
        assert "the newest checkpoint is checkpoint-2" in note
        assert str(caught.value) not in note


@pytest.mark.parametrize("choice", ["raise", "continue"])
def test_cause_of_a_failed_background_save_is_logged_once_and_raised_once(
    choice: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fail_writes(monkeypatch)
    trainer = new_trainer(tmp_path, LifecycleCallback(on_save_failure=choice), max_steps=4)
    if choice == "raise":
        with pytest.raises(SaveFailed):
            trainer.train()
    else:
        trainer.train()
    (said,) = [text for text in caplog.messages if "No space left" in text]
    assert f"{tmp_path}/checkpoint-4: not saved: OSError: " in said
    assert "the newest checkpoint is checkpoint-2" in said
    others = [text for text in caplog.messages if "not saved" in text and text != said]
    assert len(others) == (2 if choice == "continue" else 0)  # that training continues, and at its end


class LastDoesNotFit(Trainer):
    def save_model(self, *given: Any, **named: Any) -> None:
        with files_of_at_most(100 if self.state.global_step == self.state.max_steps else resource.RLIM_INFINITY):
            super().save_model(*given, **named)


def test_failure_of_the_last_save_is_said_again_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callback = LifecycleCallback(on_save_failure="continue")
    trainer = new_trainer(tmp_path, callback, kind=LastDoesNotFit)
    trainer.train()
    assert names(tmp_path) == [".lifecycle", "checkpoint-2", "checkpoint-4", "lifecycle.jsonl"]
    last = caplog.records[-1]
    assert (last.levelno, "checkpoint-6" in last.getMessage()) == (logging.WARNING, True)
    assert last.getMessage().startswith("the last save of this training failed")


def test_best_model_that_could_not_be_saved_is_said_and_the_best_of_those_that_are_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(
        tmp_path,
        LifecycleCallback(on_save_failure="continue"),
        kind=LastDoesNotFit,
        evaluated=Rows(16),
        eval_strategy="steps",
        eval_steps=2,
        label_names=["labels"],
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_global_step == 6  # the loss falls all the way
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert "checkpoint-6 (the best so far): not saved" in caplog.text


class NoState:
    def state_dict(self) -> dict[str, Any]:
        return {"fn": len}

    def load_state_dict(self, state: Any) -> None:
        raise AssertionError


def test_state_that_cannot_be_stored_at_all_is_an_error_whatever_was_chosen(tmp_path: Path) -> None:
    callback = LifecycleCallback(on_save_failure="continue", objects={"mine": NoState()})
    with pytest.raises(UnsafeStateError, match="fn"):
        new_trainer(tmp_path, callback).train()
    assert names(tmp_path) == [".lifecycle", "lifecycle.jsonl"]


def test_any_other_choice_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="on_save_failure must be 'raise' or 'continue', got 'ignore'"):
        LifecycleCallback(on_save_failure="ignore")  # type: ignore[arg-type]
