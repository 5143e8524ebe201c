"""A fault at the side of a save: what was committed stays committed, and what was not leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle import KeepLast, LifecycleCallback, SaveFailed
from hf_lifecycle.checkpoint.directory import listing
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, hidden_folder, problems_of, staging_folder
from hf_lifecycle.checkpoint.files import tree
from hf_lifecycle.engine import background_saves
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.saving.writer import Writer
from tests.accelerator.tiny import new_script
from tests.trainer.runs import new_trainer


def steps_in(directory: Path) -> list[int]:
    """The steps of the checkpoints, oldest first, each of them whole."""
    found = checkpoints_in(directory)
    assert [problems_of(path, full=True) for _, path in found] == [[]] * len(found)
    return [step for step, _ in reversed(found)]


def _block(folder: Path) -> None:
    """Let a folder of the hidden one be impossible to make: a file is in its place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("")


@pytest.mark.parametrize("kind", ["loop", "loop in the background", "Trainer", "Trainer in the background"])
def test_old_checkpoint_that_cannot_be_removed_costs_no_save(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _block(hidden_folder(tmp_path) / "removed")
    if kind.startswith("loop"):
        script = new_script(tmp_path, keep=KeepLast(1))
        script.run(epochs=1, save_at=(2, 4, 6), wait=kind == "loop")
        script.manager.close()
    else:
        callback = LifecycleCallback(keep=KeepLast(1), async_save=kind != "Trainer")
        new_trainer(tmp_path, callback, max_steps=6, save_steps=2).train()
    assert steps_in(tmp_path) == [2, 4, 6]
    told = [event.event for event in read_events(tmp_path)]
    assert (told.count("committed"), told.count("removed"), told.count("failed")) == (3, 0, 0)
    said = [record.getMessage() for record in caplog.records if "could not be removed" in record.getMessage()]
    assert len(said) == 2  # one line a save, however many are left
    assert ": checkpoint-2, checkpoint-4 could not be removed" in said[1]
    assert said[1].endswith("the next save tries again")
    (hidden_folder(tmp_path) / "removed").unlink()


@pytest.mark.parametrize("kind", ["loop", "Trainer", "Trainer in the background"])
def test_old_checkpoints_that_cannot_be_listed_cost_no_save(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, tries = listing.infos_of_this_run, []

    def listed(directory: Path) -> Any:
        tries.append(directory)
        if len(tries) == 2:
            raise OSError(errno.EIO, "Input/output error", str(directory))
        return real(directory)

    monkeypatch.setattr(listing, "infos_of_this_run", listed)
    if kind == "loop":
        script = new_script(tmp_path, keep=KeepLast(1))
        script.run(epochs=1, save_at=(2, 4, 6), wait=True)
        script.manager.close()
    else:
        callback = LifecycleCallback(keep=KeepLast(1), async_save=kind != "Trainer")
        new_trainer(tmp_path, callback, max_steps=6, save_steps=2).train()
    assert len(tries) == 3
    assert steps_in(tmp_path) == [6]  # what was left at the second save goes at the third
    told = [event.event for event in read_events(tmp_path)]
    assert (told.count("committed"), told.count("removed"), told.count("failed")) == (3, 2, 0)
    (said,) = [record.getMessage() for record in caplog.records if "could not be removed" in record.getMessage()]
    assert ": older checkpoints could not be removed" in said
    assert said.endswith("the next save tries again")


@pytest.mark.parametrize("wait", [True, False])
def test_commit_that_fails_leaves_no_staged_folder(
    wait: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "hf_lifecycle")
    _block(hidden_folder(tmp_path) / "replaced")  # so that a checkpoint-4 which is there cannot be moved aside
    (tmp_path / "checkpoint-4").mkdir()
    script = new_script(tmp_path)
    with pytest.raises(OSError if wait else SaveFailed, match="checkpoint-4"):
        script.run(epochs=1, save_at=(2, 4), wait=wait)
    script.manager.close()
    assert list(staging_folder(tmp_path).iterdir()) == []
    assert steps_in(tmp_path) == [2]
    assert [event.facts["step"] for event in read_events(tmp_path) if event.event == "failed"] == [4]
    assert "checkpoint-4" in caplog.text


@pytest.mark.parametrize("kind", ["loop", "Trainer"])
def test_objects_are_digested_where_they_are_written(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    average, read_by = torch.nn.Linear(499, 3), []
    read = tree.tensor_bytes

    def reading(tensor: torch.Tensor) -> tree.Bytes:
        if tensor.shape == average.weight.shape:
            read_by.append(threading.current_thread() is threading.main_thread())
        return read(tensor)

    monkeypatch.setattr(tree, "tensor_bytes", reading)
    if kind == "loop":
        script = new_script(tmp_path, objects={"average": average})
        script.run(epochs=1, save_at=(2, 4, 6), wait=False)
        script.manager.close()
    else:
        new_trainer(tmp_path, LifecycleCallback(objects={"average": average}), max_steps=6, save_steps=2).train()
    assert steps_in(tmp_path) == [2, 4, 6]
    assert read_by == [True, False, False]  # the first save is not made in the background


def test_verdict_of_a_writer_that_is_done_at_once_stands(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtOnce(Writer):
        """Is done before whoever started it goes on."""

        def start(self, *given: Any) -> None:
            super().start(*given)
            self.join()

    monkeypatch.setattr(background_saves, "Writer", AtOnce)
    monkeypatch.setattr(Snapshot, "settled", property(lambda snapshot: False))  # every snapshot is torn
    new_trainer(tmp_path, LifecycleCallback(), max_steps=4, save_steps=2).train()
    assert steps_in(tmp_path) == [2]  # which Trainer made
    assert "the last save of this training failed" in caplog.text
    assert list(staging_folder(tmp_path).iterdir()) == []
