"""The newest checkpoint of a directory and its mirror."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import shutil
from pathlib import Path

import fsspec
import pytest
import xxhash

from hf_lifecycle import Mirror, MirrorError, MirrorOfAnotherRun, NotEnoughSpace, NoUsableCheckpoint, latest_checkpoint
from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.mirror.places import FolderPlace
from hf_lifecycle.mirror.worker import MirrorWorker
from tests.mirror.runs import Told, files_of, fresh_url, make, steps_at
from tests.mirror.server import S3

X_DIGEST = xxhash.xxh3_128_hexdigest(b"x")


def mirrored(out: Path, url: str | Mirror, *steps: int) -> Mirror:
    """A run that has committed ``steps``, each of which is at the mirror."""
    mirror = Mirror.of(url)
    for step in steps:
        carrier = MirrorWorker(mirror, out, Told())
        carrier.offer(make(out, step))
        carrier.close()
    assert steps_at(mirror)[: len(steps)] == sorted(steps, reverse=True)
    return mirror


@pytest.mark.parametrize("kind", ["folder", "memory", "s3"])
def test_run_whose_disk_is_gone_is_found_at_the_mirror_and_fetched(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    s3: S3 | None = request.getfixturevalue("s3") if kind == "s3" else None
    place = Mirror(s3.fresh_url(), s3.options) if s3 is not None else Mirror(fresh_url(kind, tmp_path))
    out = tmp_path / "out"
    assert latest_checkpoint(out, mirror=place) is None
    assert not out.exists()
    mirrored(out, place, 4, 8)
    expected = files_of(out / "checkpoint-8")
    shutil.rmtree(out)
    found = latest_checkpoint(str(out), mirror=place)
    assert found == str(out / "checkpoint-8")
    assert files_of(Path(found)) == expected
    assert [path.name for path in out.iterdir() if path.name != ".lifecycle"] == ["checkpoint-8"]
    assert latest_checkpoint(out, mirror=place) == found  # now it is here
    mirrored(out, place, 12)  # and the run goes on into the same mirror
    assert steps_at(place) == [12, 8, 4]


def test_newest_of_both_is_taken(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4, 8)
    shutil.rmtree(out / "checkpoint-8")
    assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-8")
    make(out, 12)
    assert latest_checkpoint(out, mirror=str(tmp_path / "drive")) == str(out / "checkpoint-12")
    assert latest_checkpoint(out) == str(out / "checkpoint-12")


@pytest.mark.parametrize("damage", ["flipped", "cut", "manifest"])
def test_damaged_copy_is_passed_over_for_the_one_before(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4, 8)
    shutil.rmtree(out)
    file = tmp_path / "drive" / "checkpoint-8" / ("lifecycle/manifest.json" if damage == "manifest" else "step.bin")
    file.write_bytes({"flipped": b"9", "cut": b"", "manifest": b"{"}[damage])
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-4")
    assert "skipped" in caplog.text
    assert not (out / "checkpoint-8").exists()
    shutil.rmtree(out)
    (tmp_path / "drive" / "checkpoint-4" / "model.safetensors").write_bytes(b"x" * 693)
    with pytest.raises(NoUsableCheckpoint) as caught:
        latest_checkpoint(out, mirror=mirror)
    assert len(caught.value.problems) == 2
    assert list((store.hidden_folder(out) / "fetching").iterdir()) == []


def test_damaged_checkpoint_here_is_moved_aside_for_its_copy(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    (out / "checkpoint-4" / "step.bin").write_bytes(b"!")
    assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-4")
    assert problems_of(out / "checkpoint-4", full=True) == []
    assert (out / "damaged-checkpoint-4" / "step.bin").read_bytes() == b"!"


def test_mirror_out_of_reach_is_a_warning_with_a_checkpoint_here_and_an_error_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, url = tmp_path / "out", tmp_path / "not" / "mounted"
    with pytest.raises(MirrorError, match="mount the drive"):
        latest_checkpoint(out, mirror=url)
    make(out, 4)
    assert latest_checkpoint(out, mirror=url) == str(out / "checkpoint-4")
    assert "mount the drive" in caplog.text


def test_bucket_that_is_not_there_is_an_error_not_an_empty_mirror(tmp_path: Path, s3: S3) -> None:
    with pytest.raises(MirrorError, match="no bucket 'nowhere'"):
        latest_checkpoint(tmp_path / "out", mirror=Mirror("s3://nowhere/run", s3.options))


def test_mirror_of_another_run_is_refused(tmp_path: Path) -> None:
    mirror = mirrored(tmp_path / "one", str(tmp_path / "drive"), 4)
    make(tmp_path / "two", 2)
    with pytest.raises(MirrorOfAnotherRun, match="another run than"):
        latest_checkpoint(tmp_path / "two", mirror=mirror)


def test_fetch_removes_what_a_killed_fetch_of_another_checkpoint_left(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    shutil.rmtree(out / "checkpoint-4")
    left = store.working_folder(out, "fetching") / "checkpoint-2"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"torn")
    assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-4")
    assert list(left.parent.iterdir()) == []


def test_room_is_asked_for_before_anything_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    shutil.rmtree(out)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    with pytest.raises(NotEnoughSpace):
        latest_checkpoint(out, mirror=mirror)
    assert not (out / "checkpoint-4").exists()


@pytest.mark.parametrize("paths", [("a", "a/b"), ("lifecycle",)])
def test_names_that_are_in_each_other_s_way_are_a_damaged_copy_and_harm_nothing(
    tmp_path: Path, paths: tuple[str, ...], s3: S3, caplog: pytest.LogCaptureFixture
) -> None:
    out, mirror = tmp_path / "out", Mirror(s3.fresh_url(), s3.options)
    mirrored(out, mirror, 4, 8)
    shutil.rmtree(out)
    files, root = fsspec.core.url_to_fs(mirror.url, **s3.options)
    for path in paths:
        files.pipe_file(f"{root}/checkpoint-8/{path}", b"x")
    manifest = files.cat_file(f"{root}/checkpoint-8/lifecycle/manifest.json")
    told = {**json.loads(manifest), "files": [{"path": p, "size": 1, "xxh3_128": X_DIGEST} for p in paths]}
    files.pipe_file(f"{root}/checkpoint-8/lifecycle/manifest.json", json.dumps(told).encode() + b"\n")
    assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-4")
    assert "is listed as a file and as a folder" in caplog.text
    assert not (out / "checkpoint-8").exists()


def test_mirror_that_names_no_run_is_an_error_that_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    (tmp_path / "drive" / ".lifecycle" / "run").write_bytes(b"../../etc")
    assert latest_checkpoint(out, mirror=mirror) == str(out / "checkpoint-4")
    shutil.rmtree(out)
    with pytest.raises(MirrorError, match="does not name a run"):
        latest_checkpoint(out, mirror=mirror)


def test_disk_that_fills_while_fetching_is_named_and_no_copy_is_blamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    shutil.rmtree(out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FolderPlace, "get", full)
    with pytest.raises(NotEnoughSpace):
        latest_checkpoint(out, mirror=mirror)


def test_link_in_the_place_of_the_folder_for_fetching_is_not_followed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirror = mirrored(out, str(tmp_path / "drive"), 4)
    shutil.rmtree(out / "checkpoint-4")
    (tmp_path / "outside").mkdir()
    (store.hidden_folder(out) / "fetching").symlink_to(tmp_path / "outside")
    with pytest.raises(NotADirectoryError):
        latest_checkpoint(out, mirror=mirror)
    assert list((tmp_path / "outside").iterdir()) == []


def _ask(out: str, url: str, answers: multiprocessing.SimpleQueue[tuple[str | None, int]]) -> None:
    found = latest_checkpoint(out, mirror=url)
    assert found is not None
    answers.put((found, os.stat(found).st_ino))


@pytest.mark.skipif(os.name == "nt", reason="needs fork")
def test_processes_that_ask_at_once_get_the_same_checkpoint_fetched_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    mirrored(out, str(tmp_path / "drive"), 4)
    shutil.rmtree(out)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    ranks = [context.Process(target=_ask, args=(str(out), str(tmp_path / "drive"), answers)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert len({answers.get() for _ in ranks}) == 1
