"""doctor: whether a run can be resumed, what would differ here, what happened, and what to type next."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer.runs import break_off, flip, new_trainer

from hf_lifecycle import DamagedCheckpoint, LifecycleCallback
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock, holder_of
from hf_lifecycle.state import environment


def said(result: Any) -> str:
    return " ".join(result.stdout.split())


def test_run_that_was_interrupted_says_from_where_it_resumes(invoke: Any, tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path / "run", LifecycleCallback()), step=5)
    result = invoke("doctor", tmp_path / "run")
    text = said(result)
    assert result.exit_code == 0
    assert "interrupted after step 4" in text
    assert "can be resumed yes, from checkpoint-4 (step 4, epoch 1" in text
    assert "differs here nothing" in text
    assert "last event" in text
    assert "next run the training command again: it resumes at step 4" in text
    assert len(result.stdout.splitlines()) <= 12


def test_finished_run_says_so_and_where_its_result_is(invoke: Any, run: Path) -> None:
    report = json.loads(invoke("doctor", run, "--json").stdout)
    assert (report["state"], report["is_over"], report["holder"]) == ("finished at step 8", True, None)
    assert report["next"] == f"hf-lifecycle show {run / 'checkpoint-8'}"
    assert "early stopping best" in said(invoke("doctor", run))


def test_damage_is_named_and_an_older_checkpoint_is_used(invoke: Any, run: Path) -> None:
    os.truncate(run / "checkpoint-8" / "model.safetensors", 10)
    result = invoke("doctor", run)
    assert result.exit_code == 0
    assert "damaged checkpoint-8: " in said(result)
    assert "checkpoint-6 (step 6" in said(result)


def test_run_without_an_intact_checkpoint_cannot_be_resumed(invoke: Any, run: Path) -> None:
    for path in run.glob("checkpoint-*/model.safetensors"):
        os.truncate(path, 10)
    result = invoke("doctor", run)
    assert result.exit_code == 1
    assert "can be resumed no: none of 4 checkpoints is intact" in said(result)
    assert f"next hf-lifecycle verify {run}" in said(result)  # a command is not folded


def test_checkpoint_that_was_edited_is_to_be_accepted(invoke: Any, run: Path) -> None:
    state = run / "checkpoint-8" / "trainer_state.json"
    state.write_text(state.read_text() + " ")
    report = json.loads(invoke("doctor", run, "--json").stdout)
    assert report["next"] == f"hf-lifecycle accept {run / 'checkpoint-8'}"


def test_empty_directory_has_nothing_to_resume_from(invoke: Any, tmp_path: Path) -> None:
    result = invoke("doctor", tmp_path)
    assert result.exit_code == 0
    assert "can be resumed no checkpoint yet" in said(result)
    assert "starts from step 0" in said(result)


def test_folder_that_is_named_like_a_checkpoint_and_is_none_is_shown(invoke: Any, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    result = invoke("doctor", tmp_path)
    assert result.exit_code == 0
    assert "skipped checkpoint-3: no trainer_state.json, no files of hf_lifecycle" in said(result)
    assert json.loads(invoke("doctor", tmp_path, "--json").stdout)["not_checkpoints"] == ["checkpoint-3"]


def test_commands_are_quoted_for_a_shell(invoke: Any, run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "it's a run"
    shutil.copytree(run, moved)
    newest = moved / "checkpoint-8"
    report = json.loads(invoke("doctor", moved, "--json").stdout)
    assert shlex.split(report["next"]) == ["hf-lifecycle", "show", str(newest)]
    state = newest / "trainer_state.json"
    state.write_text(state.read_text() + " ")
    report = json.loads(invoke("doctor", moved, "--json").stdout)
    assert shlex.split(report["next"]) == ["hf-lifecycle", "accept", str(newest)]
    assert f"hf-lifecycle accept {shlex.quote(str(newest))}" in str(DamagedCheckpoint(newest, ["edited"], None, ["x"]))


def test_other_versions_are_named_with_the_command_that_installs_them(
    invoke: Any, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = environment.capture_versions() | {"accelerate": "0.1", "python": "3.0"}
    monkeypatch.setattr("hf_lifecycle.cli.diagnosis.capture_versions", lambda: versions)
    for command in ["doctor", run], ["show", run / "checkpoint-8"]:
        text = said(invoke(*command))
        assert "accelerate: " in text
        assert "pip install accelerate==" in text
        assert "python" not in text.partition("differs here")[2].partition("metric")[0]


def test_show_begins_with_what_one_asks_first_and_of_a_directory_is_doctor(invoke: Any, run: Path) -> None:
    assert said(invoke("show", run / "checkpoint-8")).startswith("can be resumed yes")
    assert said(invoke("show", run)) == said(invoke("doctor", run))
    flip(run / "checkpoint-8" / "lifecycle" / "rank-00000.safetensors", 200)
    assert said(invoke("show", run / "checkpoint-8")).startswith("can be resumed no")


HOLDS = """
import sys
from pathlib import Path
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="F_GETLK is asked on Linux only")
def test_process_that_trains_here_is_named_and_its_lock_is_left_alone(invoke: Any, run: Path) -> None:
    lock = run / ".lifecycle" / "lock"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for _ in range(2):
            assert f"training now (process {other.pid} on" in said(invoke("doctor", run))
        other.communicate()
    assert holder_of(lock) is None


def test_own_lock_is_not_dropped_by_asking_who_holds_it(tmp_path: Path) -> None:
    file = tmp_path / ".lifecycle" / "lock"
    file.parent.mkdir()
    lock = DirectoryLock(file)
    lock.acquire()
    assert holder_of(file) is None
    code = "import sys; from pathlib import Path; from hf_lifecycle.checkpoint.directory.lock import holder_of;"
    asked = subprocess.run(
        [sys.executable, "-c", f"{code} print(holder_of(Path(sys.argv[1])))", str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    lock.release()
    assert asked.stdout.startswith(f"process {os.getpid()} on ")
    shutil.rmtree(file.parent)
