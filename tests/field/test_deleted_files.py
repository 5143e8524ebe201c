"""Files that a person has deleted from checkpoints, or added to the output directory, take nothing else away.

``optimizer.pt`` is often deleted to save space. What is left is not damaged: it stays where it is, and weights go on
with a new optimizer as with Trainer alone, where the user says so.
"""

from __future__ import annotations

import logging
from pathlib import Path
from shutil import rmtree

import pytest

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.errors import NoUsableCheckpoint, ResumeMismatch
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from tests.field.limits import Limit
from tests.trainer.runs import break_off, new_trainer, require_same_end, saved_run

WITHOUT_OPTIMIZER = Limit(
    what="`optimizer.pt` or `scheduler.pt` was deleted from every checkpoint",
    when="at the resume",
    line="… deleted from the checkpoint, so optimizer and scheduler start from their initial state",
    outcome="an error",
)


def _delete(directory: Path, name: str) -> None:
    for path in directory.glob(f"checkpoint-*/{name}"):
        path.unlink()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_checkpoints_without_their_optimizer_stay_and_are_refused_by_name(name: str, tmp_path: Path) -> None:
    saved_run(tmp_path)
    _delete(tmp_path, name)
    trainer = new_trainer(tmp_path, LifecycleCallback())
    assert sorted(path.name for path in tmp_path.glob("*checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    with pytest.raises(ResumeMismatch) as refused:
        trainer.train(resume_from_checkpoint=True)
    WITHOUT_OPTIMIZER.require_told(str(refused.value))


def test_weights_go_on_with_a_new_optimizer_as_with_trainer_alone(tmp_path: Path) -> None:
    saved_run(tmp_path)
    _delete(tmp_path, "optimizer.pt")
    found = latest_checkpoint(tmp_path)
    assert found == str(tmp_path / "checkpoint-4")
    ours = new_trainer(tmp_path, LifecycleCallback(strict=False), save_strategy="no")
    stock = new_trainer(tmp_path, save_strategy="no")
    begun = []
    for trainer in (ours, stock):
        break_off(trainer, at="on_step_begin", step=4, resume=found)
        begun.append({name: tensor_digest(one) for name, one in module_tensors(trainer.model).items()})
        assert not trainer.optimizer.state_dict()["state"]
    assert begun[0] == begun[1]
    ours.train(resume_from_checkpoint=found)
    assert ours.state.global_step == 6


@pytest.mark.parametrize("name", ["rng_state.pth", "training_args.bin"])
def test_resume_without_a_file_that_decides_nothing_is_exact(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken = new_trainer(tmp_path / "unbroken", LifecycleCallback())
    unbroken.train()
    saved_run(tmp_path / "broken")
    _delete(tmp_path / "broken", name)
    resumed = new_trainer(tmp_path / "broken", LifecycleCallback())
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        resumed.train(resume_from_checkpoint=True)
    assert f"{name} deleted since it was saved" in caplog.text
    live = [module_tensors(trainer.model) for trainer in (resumed, unbroken)]
    assert all(tensor_digest(live[0][key]) == tensor_digest(live[1][key]) for key in live[1])


def test_older_checkpoint_that_has_all_its_files_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_run(tmp_path)
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 skipped: optimizer.pt deleted" in caplog.text


def test_where_all_lack_it_one_line_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved_run(tmp_path)
    _delete(tmp_path, "optimizer.pt")
    caplog.clear()
    latest_checkpoint(tmp_path)
    (said,) = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert "checkpoint-4: optimizer.pt deleted" in said
    assert "no other has all its files" in said


def test_checkpoint_without_weights_is_damaged(tmp_path: Path) -> None:
    saved_run(tmp_path)
    _delete(tmp_path, "optimizer.pt")
    _delete(tmp_path, "model.safetensors")
    with pytest.raises(NoUsableCheckpoint):
        latest_checkpoint(tmp_path)


def test_file_of_the_name_of_our_folder_is_left_alone(tmp_path: Path) -> None:
    def make(folder: str) -> object:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / ".lifecycle").write_text("mine")
        return new_trainer(tmp_path / folder, LifecycleCallback())

    require_same_end(make)  # type: ignore[arg-type]
    assert (tmp_path / "broken" / ".lifecycle").read_text() == "mine"


def test_checkpoint_whose_own_folder_was_deleted_is_passed_over_for_an_older_one_and_given_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rmtree(saved_run(tmp_path) / "lifecycle")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 skipped: lifecycle/ missing, which LifecycleCallback saves" in caplog.text
    rmtree(tmp_path / "checkpoint-2" / "lifecycle")
    new_trainer(tmp_path, LifecycleCallback(strict=False)).train(resume_from_checkpoint=latest_checkpoint(tmp_path))
    assert (tmp_path / "checkpoint-6").is_dir()
    assert not list(tmp_path.glob("damaged-*"))


@pytest.mark.parametrize("older", [True, False])
def test_resume_without_a_manifest_warns_and_names_the_intact_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, *, older: bool
) -> None:
    checkpoint = saved_run(tmp_path)
    (checkpoint / "lifecycle" / "manifest.json").unlink()
    if not older:
        rmtree(tmp_path / "checkpoint-2")
    new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=str(checkpoint))
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(told) == 1
    assert "checkpoint-4: it has no lifecycle/manifest.json, so no file was verified" in told[0]
    assert ("checkpoint-2, which is intact" if older else "no other checkpoint there verifies") in told[0]


@pytest.mark.parametrize("name", ["model.safetensors", "lifecycle/rank-00000.safetensors"])
def test_damage_that_no_manifest_found_is_told_as_damage_with_the_intact_checkpoint(name: str, tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    (checkpoint / "lifecycle" / "manifest.json").unlink()
    content = bytearray((checkpoint / name).read_bytes())
    content[-9] ^= 1
    (checkpoint / name).write_bytes(content)
    with pytest.raises(ResumeMismatch, match=r"(?s)any may be damaged\n.*checkpoint-2, which is intact"):
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=str(checkpoint))
