"""The output directory is the one that its path meant when training began, whatever happens around it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from typer.testing import CliRunner

from hf_lifecycle import KeepLast, LifecycleCallback, TrainingStateManager, latest_checkpoint
from hf_lifecycle.checkpoint.directory.verification import problems_of
from hf_lifecycle.cli.app import app
from hf_lifecycle.errors import NoUsableCheckpoint
from tests import preloaded
from tests.trainer.runs import break_off, digests, new_trainer


class Elsewhere(TrainerCallback):
    """Trains each step in another working directory, as code that runs programs or writes files does."""

    def __init__(self, elsewhere: Path, *, comes_back: bool = True) -> None:
        self._elsewhere, self._comes_back = elsewhere, comes_back
        self._before = ""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before = os.getcwd()
        os.chdir(self._elsewhere)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._comes_back:
            os.chdir(self._before)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Another directory; the test begins in the folder ``home``."""
    (tmp_path / "home").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "elsewhere"


def _names(directory: Path | str) -> list[str]:
    return sorted(path.name for path in Path(directory).glob("checkpoint-*"))


@pytest.mark.parametrize("comes_back", [True, False], ids=["for a moment", "for good"])
@pytest.mark.parametrize("background", [True, False])
def test_relative_output_dir_stays_where_training_began(background: bool, comes_back: bool, elsewhere: Path) -> None:
    ours = LifecycleCallback(async_save=background, keep=KeepLast(2), mirror=str(elsewhere / "mirror"))
    trainer = new_trainer(Path("out"), Elsewhere(elsewhere, comes_back=comes_back), ours, save_steps=1)
    trainer.train()
    out = elsewhere.parent / "home" / "out"
    assert trainer.args.output_dir == "out"
    assert _names(out) == ["checkpoint-5", "checkpoint-6"]
    assert all(problems_of(out / name, full=True) == [] for name in _names(out))
    assert (out / "lifecycle.jsonl").is_file()
    assert sorted(path.name for path in elsewhere.iterdir()) == ["mirror"]
    assert "checkpoint-6" in _names(elsewhere / "mirror")


def test_best_weights_are_found_from_another_working_directory(elsewhere: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    here = new_trainer(Path("here"), LifecycleCallback(), learning_rate=0.5, **settings)
    here.train()
    there = new_trainer(
        Path("there"), Elsewhere(elsewhere, comes_back=False), LifecycleCallback(), learning_rate=0.5, **settings
    )
    there.train()
    assert digests(there) == digests(here)
    assert there.state.best_model_checkpoint == str(here.state.best_model_checkpoint).replace("here", "there")


def test_latest_checkpoint_means_the_same_from_everywhere(elsewhere: Path) -> None:
    new_trainer(Path("out"), LifecycleCallback(), max_steps=2).train()
    found = latest_checkpoint("out")
    os.chdir(elsewhere)
    assert found is not None
    assert problems_of(Path(found), full=True) == []


def test_home_directory_means_the_same_to_latest_checkpoint_as_to_the_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer = new_trainer(Path("~/out"), LifecycleCallback(), max_steps=2)
    trainer.train()
    assert latest_checkpoint("~/out") == str(tmp_path / "out" / "checkpoint-2")


def test_relative_directory_of_a_loop_stays_where_the_manager_was_made(elsewhere: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(2, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    manager = TrainingStateManager(accelerator, "runs/loop", keep_last=1)
    assert manager.resume() is None
    for _ in manager.epochs(2):
        os.chdir(elsewhere)
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        manager.save()
    manager.close()
    place = elsewhere.parent / "home" / "runs" / "loop"
    assert len(_names(place)) == 1
    assert latest_checkpoint(place) == str(place / _names(place)[0])
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_new_output_directory_is_flushed_at_every_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    fsync = os.fsync

    def watched(descriptor: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    new_trainer(tmp_path / "a" / "b" / "run", LifecycleCallback(), max_steps=2).train()
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")} <= set(flushed)


def _begin(directory: Path, *, until: int, **settings: Any) -> None:
    """A run of 6 steps into ``directory`` that is killed at a step."""
    break_off(new_trainer(directory, LifecycleCallback(), **{"save_steps": 1, **settings}), step=until)


@pytest.mark.parametrize("stock", [False, True], ids=["of ours", "of stock Trainer"])
def test_run_begun_anew_beside_another_is_the_one_that_is_resumed(
    stock: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(tmp_path, *([] if stock else [LifecycleCallback()]), seed=1).train()
    caplog.clear()
    _begin(tmp_path, until=2, save_steps=1)
    warned = [record.message for record in caplog.records if "starts from step 0" in record.message]
    assert len(warned) == 1
    assert "checkpoint-6, checkpoint-4, checkpoint-2" in warned[0]

    caplog.clear()
    found = latest_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-2")
    assert "checkpoint-6, checkpoint-4, of an older run" in caplog.text
    caplog.clear()
    break_off(new_trainer(tmp_path, LifecycleCallback(), save_steps=1), step=3, resume=found)
    assert "starts from step 0" not in caplog.text
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    assert CliRunner().invoke(app, ["list", str(tmp_path)]).stdout.count("older run") == 2


def test_highest_step_of_an_older_run_is_reported_when_it_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_trainer(tmp_path, LifecycleCallback()).train()
    _begin(tmp_path, until=3)
    caplog.clear()
    new_trainer(tmp_path, LifecycleCallback(), max_steps=6).train(resume_from_checkpoint=True)
    assert "checkpoint-6: resumed from an older run" in caplog.text


def test_retention_and_the_mirror_keep_what_is_asked_of_the_run_at_hand(tmp_path: Path) -> None:
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    new_trainer(out, LifecycleCallback(keep=KeepLast(2), mirror=str(mirror))).train()
    callback = LifecycleCallback(keep=KeepLast(2), mirror=str(mirror))
    new_trainer(out, callback, save_steps=1, max_steps=3).train()
    assert _names(out) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-6"]
    assert "checkpoint-3" in _names(mirror)
    for name in _names(out):
        shutil.rmtree(out / name)
    assert latest_checkpoint(out, mirror=str(mirror)) == str(out / "checkpoint-3")


def test_stock_checkpoint_that_continues_a_run_is_its_newest(tmp_path: Path) -> None:
    _begin(tmp_path, until=3)
    new_trainer(tmp_path, max_steps=4).train(resume_from_checkpoint=latest_checkpoint(tmp_path))
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")


def test_damaged_run_is_not_replaced_by_an_older_one(tmp_path: Path) -> None:
    new_trainer(tmp_path, LifecycleCallback()).train()
    _begin(tmp_path, until=3)
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3"):
        os.truncate(tmp_path / name / "model.safetensors", 9)
    with pytest.raises(NoUsableCheckpoint, match="checkpoint-6: belongs to an older run"):
        latest_checkpoint(tmp_path)
    assert CliRunner().invoke(app, ["verify", str(tmp_path / "checkpoint-6")]).exit_code == 0


def test_loop_begun_anew_beside_another_run_is_the_one_that_is_resumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def steps(count: int, *, resumes: bool) -> Path | None:
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 1)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        manager = TrainingStateManager(accelerator, tmp_path)
        found = manager.resume() if resumes else None
        for _ in manager.epochs(count):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            manager.save()
        manager.close()
        return found

    steps(4, resumes=False)
    older = _names(tmp_path)
    caplog.clear()
    steps(1, resumes=False)
    assert caplog.text.count("starts from step 0") == 1
    assert latest_checkpoint(tmp_path) == str(tmp_path / older[0])


def _export(folder: Path) -> None:
    new_trainer(folder.parent / "unused", max_steps=1, save_strategy="no").save_model(str(folder))


def _notes(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "README.md").write_text("what was tried")


@pytest.mark.parametrize("fill", [_export, _notes, Path.mkdir], ids=["an export", "notes", "nothing"])
def test_folder_that_never_was_a_checkpoint_is_left_alone(
    fill: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("checkpoint-9", "checkpoint-best", "final"):
        fill(tmp_path / name)
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert latest_checkpoint(tmp_path) is None
    new_trainer(tmp_path, LifecycleCallback(keep=KeepLast(1))).train()
    assert "damaged" not in caplog.text
    assert "starts from step 0" not in caplog.text
    assert all(path.exists() for path in before)
    caplog.clear()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    assert "skipped checkpoint-9: it has neither trainer_state.json" in caplog.text
    assert CliRunner().invoke(app, ["verify", str(tmp_path)]).exit_code == 0


def test_what_lay_under_the_name_of_a_checkpoint_is_in_it_afterwards(tmp_path: Path) -> None:
    _notes(tmp_path / "checkpoint-2")
    new_trainer(tmp_path, LifecycleCallback(), max_steps=2).train()
    assert (tmp_path / "checkpoint-2" / "README.md").read_text() == "what was tried"
    assert problems_of(tmp_path / "checkpoint-2", full=True) == []


@pytest.mark.parametrize("left", ["optimizer.pt", "rng_state.pth", "a cut file"])
def test_save_of_stock_trainer_that_was_killed_is_moved_aside(left: str, tmp_path: Path) -> None:
    _export(tmp_path / "checkpoint-9")
    if left == "a cut file":
        os.truncate(tmp_path / "checkpoint-9" / "model.safetensors", 20)
    else:
        (tmp_path / "checkpoint-9" / left).write_bytes(b"")
    new_trainer(tmp_path, LifecycleCallback(), max_steps=2).train()
    assert (tmp_path / "damaged-checkpoint-9").is_dir()


@pytest.fixture
def no_place() -> Iterator[Path]:
    """A directory to which this process cannot write, as on a read-only disk; root may write anywhere, so no one is."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield folder
    finally:
        os.seteuid(user)
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_training_that_saves_nothing_needs_no_place_to_write_to(no_place: Path) -> None:
    trainer = new_trainer(no_place, LifecycleCallback(), save_strategy="no")
    trainer.train()
    assert trainer.state.global_step == 6
    assert list(no_place.iterdir()) == []


def test_training_that_saves_and_has_no_place_to_write_to_is_refused_before_its_first_step(no_place: Path) -> None:
    trainer = new_trainer(no_place, LifecycleCallback())
    with pytest.raises(PermissionError, match=f'choose another one, or .*save_strategy="no".*{no_place}'):
        trainer.train()
    assert trainer.state.global_step == 0


def test_runs_that_save_nothing_share_a_directory(tmp_path: Path) -> None:
    class Inner(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                folder = str(tmp_path)
                code = (
                    "from pathlib import Path; from hf_lifecycle import LifecycleCallback;"
                    "from tests.trainer.runs import new_trainer;"
                    f"new_trainer(Path({folder!r}), LifecycleCallback(), save_strategy='no').train()"
                )
                preloaded.run([sys.executable, "-c", code], check=True)

    trainer = new_trainer(tmp_path, LifecycleCallback(), Inner())
    trainer.train()
    assert _names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
