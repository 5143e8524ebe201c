"""What holds of every place of copies: a folder, an object store in memory, and one behind a real server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from hf_lifecycle.checkpoint.directory.manifest import MANIFEST, manifest_path, read_manifest
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.errors import MirrorError
from hf_lifecycle.mirror.objects import ObjectPlace
from hf_lifecycle.mirror.places import FolderPlace, Interrupted, Place, commit_copy
from hf_lifecycle.mirror.settings import Mirror
from tests.mirror.runs import files_of, fresh_url, make, nothing
from tests.mirror.server import S3

OWNER = "0" * 32


@pytest.fixture(params=["folder", "memory", "s3"])
def mirror(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Mirror]:
    if request.param == "s3":
        s3: S3 = request.getfixturevalue("s3")
        yield Mirror(s3.fresh_url(), s3.options)
    else:
        yield Mirror(fresh_url(request.param, tmp_path))


@pytest.fixture(params=["folder", "memory"])
def near(request: pytest.FixtureRequest, tmp_path: Path) -> Mirror:
    """Where no server is needed to tell."""
    return Mirror(fresh_url(request.param, tmp_path))


@pytest.fixture
def place(mirror: Mirror) -> Place:
    return mirror.open()


def put(place: Place, checkpoint: Path) -> Any:
    return place.put(checkpoint, read_manifest(checkpoint), OWNER, nothing)


def write(mirror: Mirror, path: str, data: bytes | None) -> None:
    """Meddle with what lies at a mirror: None removes."""
    files, root = fsspec.core.url_to_fs(mirror.url, **mirror.storage_options)
    if data is None:
        files.rm_file(f"{root}/{path}")
    else:
        if mirror.folder is not None:
            files.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
        files.pipe_file(f"{root}/{path}", data)


def names(mirror: Mirror, below: str = "") -> list[str]:
    files, root = fsspec.core.url_to_fs(mirror.url, **mirror.storage_options)
    files.invalidate_cache()
    path = f"{root}/{below}" if below else root
    cut = len(files._strip_protocol(path).strip("/")) + 1
    return sorted(found.strip("/")[cut:] for found in files.find(path))


def test_copy_comes_back_as_the_checkpoint_that_it_is_a_copy_of(mirror: Mirror, place: Place, tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "out", 4)
    assert place.look().copies == ()
    copy = put(place, checkpoint)
    assert place.look().copies == (copy,)
    assert place.look().owner == OWNER
    place.get(copy, tmp_path / "staged", nothing)
    commit_copy(tmp_path / "staged", tmp_path / "checkpoint-4", copy.manifest)
    assert files_of(tmp_path / "checkpoint-4") == files_of(checkpoint)
    assert names(mirror, "checkpoint-4") == sorted(files_of(checkpoint))


def test_interrupted_put_is_no_copy_and_the_next_one_clears_it_away(
    mirror: Mirror, place: Place, tmp_path: Path
) -> None:
    first, second = make(tmp_path / "out", 4), make(tmp_path / "out", 8)
    done = 0

    def stop(_bytes: int) -> None:
        nonlocal done
        done += 1
        if done == 3:
            raise Interrupted

    with pytest.raises(Interrupted):
        place.put(first, read_manifest(first), OWNER, stop)
    assert place.look().copies == ()
    put(place, second)
    assert [copy.name for copy in place.look().copies] == ["checkpoint-8"]
    assert not any("checkpoint-4" in name for name in names(mirror))


def test_what_others_put_there_is_neither_taken_for_a_copy_nor_touched(near: Mirror, tmp_path: Path) -> None:
    place = near.open()
    write(near, "checkpoint-2/model.safetensors", b"a stock one")
    write(near, "notes.txt", b"mine")
    for step in (4, 8):
        put(place, make(tmp_path / "out", step))
    place.remove(place.look().copies[1])
    assert [copy.step for copy in place.look().copies] == [8]
    assert {"checkpoint-2/model.safetensors", "notes.txt"} <= set(names(near))
    assert not any("checkpoint-4" in name for name in names(near))


def test_removal_that_breaks_off_leaves_no_copy_and_is_finished_later(
    mirror: Mirror, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(place, make(tmp_path / "out", 4))

    def torn(*_: Any, **__: Any) -> None:
        raise OSError("the connection is gone")

    if isinstance(place, ObjectPlace):
        monkeypatch.setattr(place, "_remove_rest", torn)
        with pytest.raises(OSError, match="gone"):
            place.remove(place.look().copies[0])
        monkeypatch.undo()
    else:
        monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
        place.remove(place.look().copies[0])
        monkeypatch.undo()
    assert place.look().copies == ()
    put(place, make(tmp_path / "out", 8))
    assert not any("checkpoint-4" in name for name in names(mirror))


@pytest.mark.parametrize("damage", [None, b"", b"longer than it was" * 99])
def test_copy_with_a_file_missing_or_of_another_size_is_seen_without_reading_it(
    near: Mirror, tmp_path: Path, damage: bytes | None
) -> None:
    place = near.open()
    copy = put(place, make(tmp_path / "out", 4))
    write(near, "checkpoint-4/model.safetensors", damage)
    assert "model.safetensors" in place.look().copies[0].problems[0]
    if damage is not None:
        with pytest.raises(MirrorError, match="bytes of the manifest"):
            place.get(copy, tmp_path / "staged", nothing)


@pytest.mark.parametrize(
    "change",
    [
        {"files": [{"path": "../../outside", "size": 1, "xxh3_128": "0" * 32}]},
        {"files": [{"path": "/etc/passwd", "size": 1, "xxh3_128": "0" * 32}]},
        {"version": 99},
        {"step": 7},
        None,
    ],
)
def test_hostile_manifest_there_is_refused_by_name(near: Mirror, tmp_path: Path, change: dict[str, Any] | None) -> None:
    place = near.open()
    checkpoint = make(tmp_path / "out", 4)
    put(place, checkpoint)
    text = {**json.loads(manifest_path(checkpoint).read_text()), **(change or {})}
    write(near, f"checkpoint-4/{MANIFEST}", json.dumps(text).encode() if change else b"\xff{")
    contents = place.look()
    assert contents.copies == ()
    assert "manifest.json" in contents.unreadable[0]


def test_damaged_source_is_never_committed(near: Mirror, tmp_path: Path) -> None:
    place = near.open()
    checkpoint = make(tmp_path / "out", 4)
    (checkpoint / "model.safetensors").write_bytes(b"WEIGHTS" * 99)  # the same size
    assert problems_of(checkpoint, full=False) == []
    with pytest.raises(MirrorError, match=r"model\.safetensors"):
        put(place, checkpoint)
    assert place.look().copies == ()


def test_same_step_again_is_another_copy_and_the_old_one_stays_until_it_is_whole(
    mirror: Mirror, place: Place, tmp_path: Path
) -> None:
    old = put(place, make(tmp_path / "out", 4, attempt="old"))
    new = make(tmp_path / "out", 4, attempt="new")

    def stop(_bytes: int) -> None:
        assert [copy.manifest.attempt for copy in place.look().copies] == ["old"]
        raise Interrupted

    with pytest.raises(Interrupted):
        place.put(new, read_manifest(new), OWNER, stop)
    put(place, new)
    if isinstance(place, FolderPlace):
        assert [copy.manifest.attempt for copy in place.look().copies] == ["new"]
    else:
        assert {copy.manifest.attempt: copy.name for copy in place.look().copies} == {
            "old": old.name,
            "new": "checkpoint-4.1",
        }


def test_stock_checkpoint_of_that_name_in_a_folder_is_not_replaced(tmp_path: Path) -> None:
    stock = tmp_path / "drive" / "checkpoint-4"
    stock.mkdir(parents=True)
    (stock / "trainer_state.json").write_bytes(b"{}")
    with pytest.raises(MirrorError, match="hf_lifecycle did not write it"):
        put(FolderPlace(tmp_path / "drive"), make(tmp_path / "out", 4))
    assert files_of(stock) == {"trainer_state.json": b"{}"}


def test_drive_that_is_not_mounted_is_an_error_and_no_folder_is_made_in_its_place(tmp_path: Path) -> None:
    place = FolderPlace(tmp_path / "drive" / "MyDrive" / "run")
    for reach in (place.look, lambda: put(place, make(tmp_path / "out", 4))):
        with pytest.raises(FileNotFoundError, match="mount the drive"):
            reach()
    assert not (tmp_path / "drive").exists()


def test_mirror_refuses_wrong_arguments_and_hides_secrets(tmp_path: Path) -> None:
    for error, arguments in [
        (ValueError, {"url": ""}),
        (ValueError, {"url": "simplecache::s3://bucket/run"}),
        (ValueError, {"url": "nosuch://x"}),
        (ValueError, {"url": "x", "wait_seconds": -1}),
        (ValueError, {"url": "x", "verify": "no"}),
        (TypeError, {"url": 3}),
        (TypeError, {"url": "x", "keep": 3}),
        (TypeError, {"url": "x", "wait_seconds": True}),
        (TypeError, {"url": "x", "storage_options": 3}),
    ]:
        with pytest.raises(error):
            Mirror(**arguments)  # type: ignore[arg-type]
    hidden = Mirror("ftp://me:word@host/run", {"secret": "word"})
    assert hidden.shown == "ftp://…@host/run"
    assert "word" not in repr(hidden)
    assert "word" not in repr(Mirror("memory://x", {"secret": "word"}))
    assert Mirror.of(tmp_path).folder == tmp_path
    assert Mirror.of(f"file://{tmp_path}").folder == tmp_path


def test_store_that_flips_a_byte_is_found_by_reading_back_and_not_by_sizes(tmp_path: Path) -> None:
    class Flipping(fsspec.get_filesystem_class("memory")):  # type: ignore[misc]
        cachable = False

        def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
            data = Path(lpath).read_bytes()
            self.pipe_file(rpath, bytes([data[0] ^ 1]) + data[1:])

    checkpoint = make(tmp_path / "out", 4)
    with pytest.raises(MirrorError, match="read back"):
        put(ObjectPlace(Flipping(), "/flips/bytes", "bytes"), checkpoint)
    assert ObjectPlace(Flipping(), "/flips/bytes", "bytes").look().copies == ()
    put(ObjectPlace(Flipping(), "/flips/sizes", "sizes"), checkpoint)
