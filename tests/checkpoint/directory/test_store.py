"""A directory of checkpoints: committed whole, verified, recovered, never torn under its name."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.admission import latest_checkpoint
from hf_lifecycle.checkpoint.directory.manifest import FileEntry, Manifest, Metric, manifest_path, read_manifest
from hf_lifecycle.checkpoint.directory.store import commit, problems_of, recover, remove, staging_folder
from hf_lifecycle.errors import NoUsableCheckpoint, StateFileError
from hf_lifecycle.processes import cores

CONTENT = {"model.safetensors": b"weights" * 99, "trainer_state.json": b"{}", "lifecycle/rank-00000.safetensors": b"x"}


def describe(step: int) -> Manifest:
    return Manifest("attempt", step, step / 4, 1, "2026-01-01T00:00:00+00:00", Metric("eval_loss", 0.5), ())


def make(directory: Path, step: int, content: dict[str, bytes] | None = None) -> Path:
    staged = staging_folder(directory) / f"checkpoint-{step}"
    for name, data in (content or CONTENT).items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(data)
    final = directory / f"checkpoint-{step}"

    def manifest(files: tuple[FileEntry, ...]) -> Manifest:
        empty = describe(step)
        return Manifest(
            empty.attempt, step, empty.epoch, empty.world_size, empty.created, empty.metric, files
        )  # fmt: skip

    commit(staged, final, manifest)
    return final


def test_committed_checkpoint_verifies_and_lists_every_file_but_its_manifest(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    assert problems_of(checkpoint, full=True) == []
    manifest = read_manifest(checkpoint)
    assert [entry.path for entry in manifest.files] == sorted(CONTENT)
    assert [entry.size for entry in manifest.files] == [len(CONTENT[entry.path]) for entry in manifest.files]
    assert (manifest.step, manifest.metric) == (3, Metric("eval_loss", 0.5))
    assert list(staging_folder(tmp_path).iterdir()) == []


@pytest.mark.parametrize("name", [*CONTENT, "lifecycle/manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "shortened", "emptied", "removed"])
def test_any_damage_to_any_file_is_found_and_the_checkpoint_passed_over(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = make(tmp_path, 3), make(tmp_path, 6)
    path = newer / name
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(
            {
                "flipped": bytes([data[0] ^ 1]) + data[1:],
                "cut": data[: len(data) // 2],
                "shortened": data[:-1],
                "emptied": b"",
            }[damage]
        )
    assert problems_of(newer, full=True)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == str(older)
    assert str(newer) in caplog.text


def test_several_threads_find_the_same_damage_in_the_order_of_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {f"model-{number:02}.safetensors": bytes([number]) * 99 * number for number in range(1, 20)}
    checkpoint = make(tmp_path, 3, content)
    for number in (2, 11, 17):
        path = checkpoint / f"model-{number:02}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    (checkpoint / "model-05.safetensors").unlink()
    by_one = problems_of(checkpoint, full=True)
    monkeypatch.setattr(cores, "_WORTH", 0)
    monkeypatch.setattr(cores, "_cores", lambda: 4)
    read: list[int] = []
    assert problems_of(checkpoint, full=True, advance=read.append) == by_one
    assert len(by_one) == 4
    assert sum(read) == sum(map(len, content.values())) - len(content["model-05.safetensors"])


def test_quick_verification_finds_what_is_missing_or_of_another_size(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    (checkpoint / "model.safetensors").write_bytes(b"short")
    (checkpoint / "trainer_state.json").unlink()
    problems = problems_of(checkpoint, full=False)
    assert len(problems) == 2
    assert "manifest says" in problems[0]
    assert "missing" in problems[1]


def test_no_checkpoint_is_none_and_only_bad_ones_are_an_error_that_names_each(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "not-there") is None
    for step in (3, 6):
        (make(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(NoUsableCheckpoint, match="every checkpoint is damaged") as caught:
        latest_checkpoint(tmp_path)
    assert len(caught.value.problems) == 2


def test_order_is_that_of_steps_not_of_names_or_times(tmp_path: Path) -> None:
    make(tmp_path, 100)
    make(tmp_path, 9)
    os.utime(tmp_path / "checkpoint-9")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-100")


def test_same_step_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    make(tmp_path, 3)
    checkpoint = make(tmp_path, 3, {**CONTENT, "model.safetensors": b"new"})
    assert (checkpoint / "model.safetensors").read_bytes() == b"new"
    assert problems_of(checkpoint, full=True) == []
    assert recover(tmp_path) == []


def test_kill_between_the_two_renames_of_a_replacement_loses_neither(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    aside = store._replaced_folder(tmp_path) / "checkpoint-3"
    aside.parent.mkdir(parents=True)
    os.rename(checkpoint, aside)  # where the kill strikes
    assert "restored" in recover(tmp_path)[0]
    assert problems_of(checkpoint, full=True) == []


def test_what_a_kill_left_unfinished_is_removed_and_nothing_whole_is_touched(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    torn = staging_folder(tmp_path) / "checkpoint-6"
    shutil.copytree(checkpoint, torn)
    assert len(recover(tmp_path)) == 1
    assert not torn.exists()
    assert problems_of(checkpoint, full=True) == []


def test_torn_stock_checkpoint_is_moved_aside_not_deleted(tmp_path: Path) -> None:
    good = make(tmp_path, 3)
    torn = tmp_path / "checkpoint-6"
    torn.mkdir()
    (torn / "model.safetensors").write_bytes(b"\x00" * 4)
    done = recover(tmp_path)
    assert "damaged" in done[0]
    assert (tmp_path / "damaged-checkpoint-6" / "model.safetensors").exists()
    assert latest_checkpoint(tmp_path) == str(good)


def test_failed_rename_leaves_the_old_checkpoint_in_place(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    with pytest.raises(FileNotFoundError):
        store._move_into_place(tmp_path / "not-there", checkpoint)
    assert problems_of(checkpoint, full=True) == []


def test_removed_checkpoint_is_gone_whole(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    remove(checkpoint)
    assert not checkpoint.exists()
    assert latest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "other"},
        {"files": [{"path": "../x", "size": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "/etc/passwd", "size": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a\\..\\b", "size": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a", "size": -1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "a", "size": 1, "xxh3_128": "zz"}]},
        {"files": [{"path": "a", "size": 1, "xxh3_128": "0" * 32}] * 2},
        {"files": 3},
        {"step": True},
        {"extra": 1},
        {"metric": {"name": "x"}},
    ],
)
def test_manifest_that_is_newer_foreign_or_hostile_is_refused_by_name(
    tmp_path: Path, change: dict[str, object]
) -> None:
    checkpoint = make(tmp_path, 3)
    path = manifest_path(checkpoint)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(StateFileError, match=r"manifest\.json"):
        read_manifest(checkpoint)
