"""Kill a loop at one file operation of its saves after another: nothing committed is lost, and the end is the same."""

from __future__ import annotations

import json
import os
import signal
import traceback
from pathlib import Path

import pytest

from hf_lifecycle import latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from tests.distributed.loop_script import STEPS, kill_at, main
from tests.resume.harness import forget_last_attempt


def attempt(directory: Path, answers: Path, operation: int) -> int:
    """Run the script in a copy of this process, which dies at a file operation. Returns how it ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            forget_last_attempt()
            if operation:
                kill_at(operation, directory)
            main(directory, answers)
            code = 0
        except BaseException:  # noqa: BLE001  nothing of the copy may come back into the test
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def newest_step(directory: Path) -> int:
    found = latest_checkpoint(directory)
    return 0 if found is None else int(Path(found).name.partition("-")[2])


@pytest.mark.slow
def test_killed_at_any_file_operation_a_loop_ends_as_one_that_was_not(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    assert attempt(tmp_path / "unbroken", answers, 0) == 0
    unbroken = json.loads((answers / "rank-0.json").read_text())
    directory, reached, ends = tmp_path / "killed", 0, []
    for operation in range(3, 64, 2):
        ends.append(attempt(directory, answers, operation))
        now = newest_step(directory)
        assert now >= reached, f"killed at operation {operation}"
        reached = now
        if ends[-1] == 0:
            break
    assert ends.count(-signal.SIGKILL) >= 8
    assert attempt(directory, answers, 0) == 0
    resumed = json.loads((answers / "rank-0.json").read_text())
    assert resumed["step"] == STEPS
    for one in (unbroken, resumed):
        one["resumed"] = one["rows"] = None
    assert resumed == unbroken


@pytest.mark.slow
def test_killed_while_saves_are_written_in_the_background_a_loop_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_WAIT", "1")
    answers, told = tmp_path / "answers", tmp_path / "answers" / "rank-0.json"
    answers.mkdir()
    assert attempt(tmp_path / "unbroken", answers, 0) == 0
    unbroken = json.loads(told.read_text())
    killed_in_the_background = 0
    for operation in range(21, 100, 9):  # the first save, which waits, takes about 20
        directory = tmp_path / str(operation)
        if attempt(directory, answers, operation) == 0:
            break
        newest = newest_step(directory)
        asked = [one.facts["step"] for one in read_events(directory) if one.event == "asked"]
        assert newest >= max([2, *asked]) - 2, f"killed at operation {operation}"
        killed_in_the_background += bool(asked) and newest < max(asked)
        assert attempt(directory, answers, 0) == 0
        resumed = json.loads(told.read_text())
        assert resumed["resumed"] == str(directory / f"checkpoint-{newest}")
        assert {**resumed, "resumed": None, "rows": None} == {**unbroken, "resumed": None, "rows": None}
    assert killed_in_the_background >= 3
