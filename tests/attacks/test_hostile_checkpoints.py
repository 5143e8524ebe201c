"""Whatever lies in a checkpoint's directory: it is judged without hanging, crashing, running or leaving it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle import latest_checkpoint
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import (
    FileEntry,
    Manifest,
    Metric,
    files_below,
    manifest_path,
    read_manifest,
)
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, commit, problems_of, recover, remove, staging_folder
from hf_lifecycle.checkpoint.directory.without_manifest import structural_problems
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.checkpoint.files.structure import ForeignStateError
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.errors import NoUsableCheckpoint, StateFileError

CONTENT = {"optimizer.pt": b"weights" * 99, "trainer_state.json": b"{}", "lifecycle/rank-00000.safetensors": b"x"}
pytestmark = [pytest.mark.timeout(60), pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")]


def staged(directory: Path, step: int = 3) -> Path:
    folder = staging_folder(directory) / f"checkpoint-{step}"
    for name, data in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def make(directory: Path, step: int = 3, metric: Metric | None = None) -> Path:
    final = directory / f"checkpoint-{step}"
    commit(
        staged(directory, step), final, lambda files: Manifest("a", step, 0.5, 1, "2026-01-01T00:00:00", metric, files)
    )
    return final


def outside(tmp_path: Path) -> Path:
    """A folder that nobody may touch."""
    folder = tmp_path / "outside"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "checkpoint-1" / "precious").write_bytes(CONTENT["optimizer.pt"])
    (folder / "optimizer.pt").write_bytes(CONTENT["optimizer.pt"])
    return folder


def everything_in(folder: Path) -> list[tuple[str, bytes]]:
    return sorted((str(path), path.read_bytes()) for path in folder.rglob("*") if path.is_file())


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    before = Path.cwd()
    os.chdir(path.parent)  # the name of a socket may have no more than some 100 bytes
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to("not-there")


def folder(path: Path) -> None:
    path.mkdir()


ODD: list[Callable[[Path], None]] = [pipe, listening, loop, device, dangling, folder]
odd = pytest.mark.parametrize("put", ODD, ids=lambda put: put.__name__)


@odd
@pytest.mark.parametrize("name", [*CONTENT, "lifecycle/manifest.json"])
def test_what_is_no_file_in_the_place_of_one_is_a_problem_that_is_named(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    checkpoint = make(tmp_path)
    (checkpoint / name).unlink()
    put(checkpoint / name)
    if name.endswith("manifest.json") and put is dangling:  # as if there were none
        assert problems_of(checkpoint, full=True) == structural_problems(checkpoint) != []
        return
    for full in (False, True):
        assert any(name in problem for problem in problems_of(checkpoint, full=full))
    with pytest.raises(NoUsableCheckpoint):
        latest_checkpoint(tmp_path)
    assert "damaged" in recover(tmp_path)[0]
    assert os.path.lexists(tmp_path / "damaged-checkpoint-3" / name)


@odd
def test_what_is_no_file_is_not_committed_and_not_waited_for(tmp_path: Path, put: Callable[[Path], None]) -> None:
    put(staged(tmp_path) / "odd.safetensors")
    checkpoint = make(tmp_path)
    assert [entry.path for entry in read_manifest(checkpoint).files] == sorted(CONTENT)
    assert problems_of(checkpoint, full=True) == []


@odd
@pytest.mark.parametrize("name", ["trainer_state.json", "model.safetensors", "optimizer.pt"])
def test_stock_checkpoint_with_what_is_no_file_is_judged_without_waiting(
    tmp_path: Path, put: Callable[[Path], None], name: str
) -> None:
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text("{}")
    if name == "trainer_state.json":
        (checkpoint / name).unlink()
    put(checkpoint / name)
    problems = structural_problems(checkpoint)
    assert bool(problems) == (name == "trainer_state.json")


@odd
def test_odd_entries_beside_checkpoints_are_passed_over(tmp_path: Path, put: Callable[[Path], None]) -> None:
    checkpoint = make(tmp_path)
    put(tmp_path / "checkpoint-9")
    if put is folder:
        (tmp_path / "checkpoint-9").rmdir()
    assert checkpoints_in(tmp_path) == [(3, checkpoint)]
    assert latest_checkpoint(tmp_path) == str(checkpoint)
    assert recover(tmp_path) == []


@odd
def test_odd_entries_among_the_left_overs_are_removed(tmp_path: Path, put: Callable[[Path], None]) -> None:
    checkpoint = make(tmp_path)
    put(staging_folder(tmp_path) / "checkpoint-9")
    recover(tmp_path)
    assert list(staging_folder(tmp_path).iterdir()) == []
    assert latest_checkpoint(tmp_path) == str(checkpoint)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_file_that_may_not_be_read_is_a_problem_not_a_crash(open_folder: Path) -> None:
    checkpoint, stock = make(open_folder), open_folder / "stock" / "checkpoint-4"
    (checkpoint / "optimizer.pt").chmod(0)
    stock.mkdir(parents=True)
    for name in ("trainer_state.json", "model.safetensors", "optimizer.pt"):
        (stock / name).write_text("{}")
        (stock / name).chmod(0)
    code = (
        "import os, sys; from pathlib import Path\n"
        "from hf_lifecycle.checkpoint.directory.store import problems_of\n"
        "os.getuid() or os.setresuid(65534, 65534, 65534)\n"
        "print(*(problem for path in sys.argv[1:] for problem in problems_of(Path(path), full=True)), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(stock)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot be read (Permission denied)") == 4


@pytest.mark.parametrize("whole", [False, True], ids=["one file", "its folder"])
def test_link_to_the_same_bytes_outside_is_not_read(tmp_path: Path, whole: bool) -> None:
    place = outside(tmp_path)
    checkpoint = make(tmp_path / "run")
    if whole:
        shutil.move(checkpoint / "lifecycle", place / "lifecycle")
        (checkpoint / "lifecycle").symlink_to(place / "lifecycle")
    else:
        (checkpoint / "optimizer.pt").unlink()
        (checkpoint / "optimizer.pt").symlink_to(place / "optimizer.pt")
    assert any("outside the checkpoint" in problem for problem in problems_of(checkpoint, full=True))


def test_link_within_the_checkpoint_and_a_link_to_a_checkpoint_are_followed(tmp_path: Path) -> None:
    checkpoint = make(tmp_path / "elsewhere")
    (checkpoint / "optimizer.pt").rename(checkpoint / "moved.pt")
    (checkpoint / "optimizer.pt").symlink_to("moved.pt")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-3").symlink_to(checkpoint)
    assert latest_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-3")


def test_removing_and_recovering_leave_alone_what_links_lead_to(tmp_path: Path) -> None:
    place, run = outside(tmp_path), tmp_path / "run"
    before = everything_in(place)
    checkpoint = make(run)
    (checkpoint / "out").symlink_to(place)
    (run / "checkpoint-9").symlink_to(place / "checkpoint-1")
    (staging_folder(run) / "checkpoint-8").symlink_to(place)
    assert len(recover(run)) == 1  # the unfinished one; checkpoint-9 leads to what never was a checkpoint
    assert (run / "checkpoint-9").is_symlink()
    remove(checkpoint)
    (run / "checkpoint-7").symlink_to(place)
    remove(run / "checkpoint-7")
    assert everything_in(place) == before
    assert not os.path.lexists(run / ".lifecycle" / "removed" / "checkpoint-7")


@pytest.mark.parametrize("name", [".lifecycle", ".lifecycle/staging", ".lifecycle/removed", ".lifecycle/replaced"])
def test_hidden_folder_that_is_a_link_is_neither_emptied_nor_written_to(tmp_path: Path, name: str) -> None:
    place, run = outside(tmp_path), tmp_path / "run"
    for sub in ("staging", "removed", "replaced"):
        (place / sub / "checkpoint-1").mkdir(parents=True)
        (place / sub / "checkpoint-1" / "precious").write_bytes(b"1")
    (run / name).parent.mkdir(parents=True)
    (run / name).symlink_to(place)
    before = everything_in(place)
    assert recover(run) == []
    if name in (".lifecycle", ".lifecycle/staging"):
        with pytest.raises(NotADirectoryError, match="a symbolic link"):
            staging_folder(run)
    assert everything_in(place) == before
    if name == ".lifecycle":
        with pytest.raises(NotADirectoryError, match="a symbolic link"):
            DirectoryLock(run / name / "lock").acquire()
    assert everything_in(place) == before


def test_lock_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"1")
    (tmp_path / ".lifecycle").mkdir()
    (tmp_path / ".lifecycle" / "lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        DirectoryLock(tmp_path / ".lifecycle" / "lock").acquire()
    assert precious.read_bytes() == b"1"


def entry(path: str) -> dict[str, Any]:
    return {"path": path, "size": 1, "xxh3_128": "0" * 32}


NAMES = [
    "", ".", "..", "../x", "a/../../x", "a/..", "./a", "a//b", "a/", "/etc/passwd", "//x", "\\x", "..\\x",
    "C:x", "C:\\x", "a\0b", "\ud800", "lifecycle/manifest.json",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_name_that_leads_out_or_means_two_files_is_refused(tmp_path: Path, name: str) -> None:
    checkpoint = make(tmp_path)
    body = json.loads(manifest_path(checkpoint).read_text())
    manifest_path(checkpoint).write_text(json.dumps({**body, "files": [entry(name)]}))
    with pytest.raises(StateFileError, match="points outside"):
        read_manifest(checkpoint)
    assert problems_of(checkpoint, full=True)


def with_text(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: "[" * 1_000_000, id="nested"),
        pytest.param(lambda text: '{"a":' * 200_000 + "1" + "}" * 200_000, id="nested objects"),
        pytest.param(lambda text: text + " " * (64 << 20), id="oversized"),
        pytest.param(with_text('"step": 3', '"step": 3, "step": 4'), id="key twice"),
        pytest.param(with_text('"epoch": 0.5', '"epoch": NaN'), id="NaN"),
        pytest.param(with_text('"epoch": 0.5', '"epoch": 1e999'), id="infinity"),
        pytest.param(with_text('"epoch": 0.5', f'"epoch": 1{"0" * 400}'), id="no float"),
        pytest.param(with_text('"epoch": 0.5', '"epoch": "0.5"'), id="text for a number"),
        pytest.param(with_text('"step": 3', f'"step": {"9" * 5000}'), id="huge integer"),
        pytest.param(with_text('"step": 3', '"step": 3.0'), id="float for a count"),
        pytest.param(with_text('"step": 3', '"step": -1'), id="negative"),
        pytest.param(with_text('"attempt": "a"', '"attempt": ["a"]'), id="list for a text"),
        pytest.param(with_text('"version": 1', '"version": true'), id="version true"),
        pytest.param(with_text('"version": 1', '"version": 0'), id="version 0"),
        pytest.param(with_text('"metric": null', '"metric": {"name": "x", "value": 1, "more": 2}'), id="metric"),
        pytest.param(with_text('"metric": null', '"metric": {"name": "x", "value": Infinity}'), id="metric infinite"),
        pytest.param(lambda text: text[: len(text) // 2], id="cut"),
        pytest.param(lambda text: "null", id="null"),
        pytest.param(lambda text: "\udcff" + text, id="not UTF-8"),
    ],
)
def test_manifest_of_any_other_shape_is_refused_and_the_checkpoint_passed_over(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    older, newer = make(tmp_path, 2), make(tmp_path, 3)
    path = manifest_path(newer)
    path.write_bytes(change(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises(StateFileError, match=r"manifest\.json"):
        read_manifest(newer)
    assert latest_checkpoint(tmp_path) == str(older)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_metric_that_is_no_number_is_none_in_the_manifest(tmp_path: Path, value: float) -> None:
    assert read_manifest(make(tmp_path, metric=Metric("eval_loss", value))).metric is None


def test_file_whose_name_no_manifest_may_hold_does_not_spoil_the_checkpoint(tmp_path: Path) -> None:
    for name in ("12:30.json", "a\\b.json"):
        (staged(tmp_path) / name).write_text("{}")
    checkpoint = make(tmp_path)
    assert problems_of(checkpoint, full=True) == []
    assert (checkpoint / "12:30.json").exists()


@pytest.mark.parametrize(
    "header",
    [
        b'{"x": {"data_offsets": [0, "1"]}, "y": {"data_offsets": [0, 1]}}',
        b'{"x": {"data_offsets": [0, 1e999]}}',
        b'{"x": {"data_offsets": [0, NaN]}}',
        b'{"x": {"data_offsets": 3}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_stock_safetensors_with_a_hostile_header_is_a_problem(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    assert "not a safetensors file" in structural_problems(tmp_path)[0]


class Gadget:
    """Pickles as a call that leaves a proof."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.proof),)


def test_pickle_with_a_gadget_runs_nowhere_and_the_optimizer_is_not_restored_from_it(tmp_path: Path) -> None:
    proof, run = tmp_path / "proof", tmp_path / "run"
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": Gadget(proof)}, staged(run) / name)
    torch.save({"state": Gadget(proof)}, tmp_path / "optimizer.pt")
    folder = staged(run)
    torch.save({"state": Gadget(proof)}, folder / "scheduler.pt")
    checkpoint = make(run)
    shutil.copy(tmp_path / "optimizer.pt", checkpoint / "optimizer.pt")
    entries = tuple(
        FileEntry(path.relative_to(checkpoint).as_posix(), path.stat().st_size, digest_file(path))
        for path in files_below(checkpoint)
    )
    manifest_path(checkpoint).write_bytes(Manifest("a", 3, 0.5, 1, "2026", None, entries).to_json())
    assert problems_of(checkpoint, full=True) == []
    assert latest_checkpoint(run) == str(checkpoint)
    assert recover(run) == []
    manifest_path(checkpoint).unlink()
    (checkpoint / "lifecycle" / "rank-00000.safetensors").unlink()
    assert structural_problems(checkpoint) == []
    with pytest.raises(ForeignStateError), open(checkpoint / "optimizer.pt", "rb") as opened:
        load_safely(opened)
    assert not proof.exists()
