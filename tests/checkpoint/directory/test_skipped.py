"""That a checkpoint was passed over is told to its run's event log, and to no log that is not to be written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.admission import latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import Manifest
from hf_lifecycle.checkpoint.directory.store import commit, hidden_folder, staging_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two checkpoints, the newer one damaged."""
    for step in (2, 4):
        staged = staging_folder(tmp_path) / f"checkpoint-{step}"
        staged.mkdir()
        (staged / "trainer_state.json").write_text("{}")
        commit(staged, tmp_path / staged.name, lambda files: Manifest("", 1, 1.0, 1, "", None, files))
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text("[]")
    return tmp_path


def skipped(directory: Path) -> list[tuple[object, ...]]:
    events = [event for event in read_events(directory) if event.event == "skipped"]
    return [(event.facts["step"], event.facts["path"], event.facts["why"]) for event in events]


def test_skipped_checkpoint_is_told_with_the_reason(run: Path) -> None:
    lock = DirectoryLock(hidden_folder(run) / "lock")
    lock.acquire()
    lock.release()
    assert latest_checkpoint(run) == str(run / "checkpoint-2")
    ((step, path, why),) = skipped(run)
    assert (step, path) == (4, "checkpoint-4")
    assert str(why).endswith("trainer_state.json: digest differs from the manifest")


def test_directory_without_a_run_of_this_package_stays_as_it_is(run: Path) -> None:
    before = sorted(run.rglob("*"))
    latest_checkpoint(run)
    assert sorted(run.rglob("*")) == before


def test_other_ranks_than_the_first_write_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (hidden_folder(run) / "lock").touch()
    monkeypatch.setenv("RANK", "1")
    latest_checkpoint(run)
    assert skipped(run) == []


def test_nothing_is_written_while_another_process_has_the_directory(run: Path) -> None:
    file = hidden_folder(run) / "lock"
    code = (
        "import sys; from pathlib import Path; from hf_lifecycle.checkpoint.directory.lock import DirectoryLock\n"
        "DirectoryLock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(file)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert latest_checkpoint(run) == str(run / "checkpoint-2")
        holder.communicate()
    assert skipped(run) == []
