"""A checkpoint in which a person edited a file is left where it is; a resume from it names the file and the way on."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from hf_lifecycle import (
    DamagedCheckpoint,
    LifecycleCallback,
    NoUsableCheckpoint,
    TrainingStateManager,
    latest_checkpoint,
)
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.manifest import MANIFEST, Manifest
from hf_lifecycle.checkpoint.directory.store import commit, recover, staging_folder
from hf_lifecycle.checkpoint.directory.verification import edited_files, edits_in, problems_of
from hf_lifecycle.checkpoint.inspection import acceptance
from hf_lifecycle.checkpoint.inspection.acceptance import accepted_in
from hf_lifecycle.checkpoint.inspection.receipt import read_receipts
from hf_lifecycle.cli.accepting import accept_edits
from tests.field.limits import Limit
from tests.trainer.runs import digests, flip, new_trainer, saved_run

EDITED = Limit(
    what="a readable file of a checkpoint (`trainer_state.json`, a config, a tokenizer's) was edited by hand",
    when="at the resume",
    line="edited since it was saved, and nothing of it was loaded:…hf-lifecycle accept",
    outcome="an error",
)
ACCEPTED = Limit(
    what="such an edit was accepted with `hf-lifecycle accept`",
    when="at the resume",
    line="not exact: trainer_state.json edited by hand, and accepted on",
)


def edit(checkpoint: Path, **changes: Any) -> None:
    """As an editor does: other content, another file."""
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    file.unlink()
    file.write_text(json.dumps(state | changes, indent=2))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    saved_run(tmp_path / "run")
    return tmp_path / "run"


def test_edited_checkpoint_is_left_where_it_is_and_passed_over(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(run / "checkpoint-4", max_steps=8)
    (sentence,) = recover(run)
    assert "trainer_state.json edited since it was saved" in sentence
    assert f"hf-lifecycle accept {run / 'checkpoint-4'}" in sentence
    assert (run / "checkpoint-4").is_dir()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(run) == str(run / "checkpoint-2")
    assert f"{run / 'checkpoint-4'} skipped: trainer_state.json edited since it was saved" in caplog.text
    edit(run / "checkpoint-2", max_steps=8)
    with pytest.raises(NoUsableCheckpoint, match=f"hf-lifecycle accept {run / 'checkpoint-2'}"):
        latest_checkpoint(run)


def test_resume_from_an_edited_checkpoint_is_an_error_that_names_the_file_and_the_way_on(run: Path) -> None:
    edit(run / "checkpoint-4", max_steps=8)
    for given in (True, str(run / "checkpoint-4")):
        with pytest.raises(DamagedCheckpoint) as caught:
            new_trainer(run, LifecycleCallback()).train(resume_from_checkpoint=given)
        EDITED.require_told(str(caught.value))
        assert "trainer_state.json" in str(caught.value)
        assert str(run / "checkpoint-2") in str(caught.value).splitlines()[-1]
        assert caught.value.edited == ("trainer_state.json",)
    assert (run / "checkpoint-4").is_dir()


@pytest.mark.parametrize("resumed", [True, False])
def test_accepted_checkpoint_is_resumed_from_with_a_warning(
    run: Path, caplog: pytest.LogCaptureFixture, resumed: bool
) -> None:
    edit(run / "checkpoint-4", best_metric=0.25)
    accept_edits(run / "checkpoint-4", lambda report: True)
    assert problems_of(run / "checkpoint-4", full=True) == []
    assert latest_checkpoint(run) == str(run / "checkpoint-4")
    (event,) = (event for event in read_events(run) if event.event == "accepted")
    assert event.facts["path"] == "checkpoint-4"
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        trainer = new_trainer(run, LifecycleCallback())
        trainer.train(resume_from_checkpoint=resumed or str(run / "checkpoint-4"))
    ACCEPTED.require_told(caplog.text)
    assert trainer.state.best_metric == 0.25
    assert "trainer_state.json" in str(read_receipts(run)[-1]["why_not_exact"])
    unbroken = new_trainer(run.parent / "unbroken", LifecycleCallback())
    unbroken.train()
    assert digests(trainer) == digests(unbroken)


def test_what_a_person_edited_is_kept_when_the_run_saves_that_step_again(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(run / "checkpoint-4", max_steps=8)
    with caplog.at_level(logging.WARNING):
        new_trainer(run, LifecycleCallback()).train(resume_from_checkpoint=latest_checkpoint(run))
    assert problems_of(run / "checkpoint-4", full=True) == []
    assert "the edited checkpoint is kept as damaged-checkpoint-4" in caplog.text
    assert json.loads((run / "damaged-checkpoint-4" / "trainer_state.json").read_text())["max_steps"] == 8


@pytest.mark.parametrize("how", ["torn", "empty", "no object", "missing", "tensors", "state", "manifest"])
def test_anything_else_is_damage_and_moved_aside(run: Path, how: str) -> None:
    checkpoint = run / "checkpoint-4"
    state = checkpoint / "trainer_state.json"
    if how == "tensors":
        edit(checkpoint, max_steps=8)
        flip(checkpoint / "model.safetensors")
    elif how == "state":
        flip(checkpoint / "lifecycle" / "rank-00000.safetensors")
    elif how == "manifest":
        flip(checkpoint / MANIFEST)
    elif how == "missing":
        state.unlink()
    else:
        state.write_bytes({"torn": state.read_bytes()[:-9], "empty": b"", "no object": b"[]"}[how])
    assert "moved to damaged-checkpoint-4" in recover(run)[0]
    assert not checkpoint.exists()


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("tokenizer_config.json", b'{"a": 1}', b'{"a": 2}'),
        ("chat_template.jinja", b"{{ x }}", b"{{ y }}"),
        ("vocab.txt", b"one\ntwo\n", b"one\nthree\n"),
        ("modeling_own.py", b"a = 1\n", b"a = 2\n"),
        ("nested/config.json", b"{}", b'{"b": 1}'),
    ],
)
def test_text_and_json_are_readable(tmp_path: Path, name: str, before: bytes, after: bytes) -> None:
    checkpoint = saved_with(tmp_path, name, before)
    (checkpoint / name).write_bytes(after)
    assert edited_files(checkpoint, problems_of(checkpoint, full=True)) == (name,)


@pytest.mark.parametrize("name", ["weights.bin", "latest", "model.safetensors.index.json", "lifecycle/x.json", "a.pkl"])
def test_tensors_and_what_finds_them_are_not_readable(tmp_path: Path, name: str) -> None:
    checkpoint = saved_with(tmp_path, name, b'{"a": 1}')
    (checkpoint / name).write_bytes(b'{"a": 2}')
    assert problems_of(checkpoint, full=True)
    assert edited_files(checkpoint, problems_of(checkpoint, full=True)) == ()


def saved_with(directory: Path, name: str, content: bytes) -> Path:
    """A checkpoint of two files."""
    staged = staging_folder(directory) / "checkpoint-1"
    (staged / name).parent.mkdir(parents=True, exist_ok=True)
    (staged / name).write_bytes(content)
    (staged / "trainer_state.json").write_bytes(b"{}")
    final = directory / "checkpoint-1"
    commit(staged, final, lambda files: Manifest("a", 1, 1.0, 1, "2026-01-31T12:00:00+00:00", None, files))
    return final


def test_step_that_was_edited_is_refused_since_the_rest_is_of_another_step(run: Path) -> None:
    before = (run / "checkpoint-4" / MANIFEST).read_bytes()
    edit(run / "checkpoint-4", global_step=3)
    report = accept_edits(run / "checkpoint-4", lambda report: True)
    assert not report["accepted"]
    assert "global_step is 3" in report["refused"][0]
    edit(run / "checkpoint-4", global_step=4, stateful_callbacks={})
    assert "missing or changed; restore it" in accept_edits(run / "checkpoint-4", lambda report: True)["refused"][0]
    assert (run / "checkpoint-4" / MANIFEST).read_bytes() == before


class Full(OSError):
    """The disk is full."""


def test_disk_that_fails_at_any_write_leaves_a_checkpoint_that_can_be_accepted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, real = run / "checkpoint-4", acceptance.write_atomically
    edit(checkpoint, best_metric=0.25)
    for number in (1, 2):
        done: list[Any] = []

        def write(path: Any, writer: Any, number: int = number, done: list[Any] = done) -> None:
            done.append(path)
            if len(done) == number:
                raise Full(28, "No space left on device", str(path))
            real(path, writer)

        monkeypatch.setattr(acceptance, "write_atomically", write)
        with pytest.raises(Full):
            accept_edits(checkpoint, lambda report: True)
        monkeypatch.undo()
        assert edited_files(checkpoint, problems_of(checkpoint, full=True)) == ("trainer_state.json",)
        assert accepted_in(checkpoint) == []
    assert accept_edits(checkpoint, lambda report: True)["accepted"]
    edit(checkpoint, best_metric=0.5)
    assert accept_edits(checkpoint, lambda report: True)["accepted"]
    assert [one["files"] for one in accepted_in(checkpoint)] == [["trainer_state.json"]] * 2


def test_file_that_changes_while_it_is_looked_at_is_not_accepted_unseen(run: Path) -> None:
    edit(run / "checkpoint-4", best_metric=0.25)

    def ask(report: Any) -> bool:
        edit(run / "checkpoint-4", best_metric=0.5)
        return True

    accept_edits(run / "checkpoint-4", ask)
    assert list(edits_in(run / "checkpoint-4")) == ["trainer_state.json"]


def test_loop_says_that_what_it_resumes_from_was_edited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def manager() -> TrainingStateManager:
        accelerator = Accelerator(cpu=True)
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: notes(Path(folder)).write_text("{}"))
        manager = TrainingStateManager(accelerator, tmp_path / "run")
        model = torch.nn.Linear(2, 1)
        accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        return manager

    def notes(folder: Path) -> Path:
        return folder / "notes.json"

    saving = manager()
    saving.resume()
    for _ in saving.epochs(1):
        checkpoint = Path(str(saving.save()))
    notes(checkpoint).write_text('{"by": "hand"}')
    with pytest.raises(DamagedCheckpoint, match="hf-lifecycle accept"):
        manager().resume(checkpoint)
    assert accept_edits(checkpoint, lambda report: True)["accepted"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        manager().resume()
    assert "not exact: notes.json edited by hand, and accepted on" in caplog.text


def test_damage_of_many_files_is_told_in_ten_lines(tmp_path: Path) -> None:
    error = DamagedCheckpoint(tmp_path, [f"file {n}: missing" for n in range(400)], tmp_path / "checkpoint-2")
    lines = str(error).splitlines()
    assert len(lines) == 6
    assert "damaged" in lines[0]
    assert "400" in lines[0]
    assert lines[4] == "  - and 397 more"
    assert "use" in lines[5]
    assert len(str(NoUsableCheckpoint(tmp_path, error.problems)).splitlines()) <= 10
