"""Kill one rank or all of them in the middle of a save, or go on by fewer: nothing that was committed is lost."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle import ResumeMismatch, latest_checkpoint
from hf_lifecycle.checkpoint.directory import store
from tests.resume.cases.tiny import Rows
from tests.resume.harness import forget_last_attempt

from .launching import launch, told
from .loop_script import main

SCRIPT = "tests.distributed.loop_script"


def newest_step(directory: Path) -> int:
    found = latest_checkpoint(directory)
    return 0 if found is None else int(Path(found).name.partition("-")[2])


@pytest.mark.slow
def test_killed_ranks_lose_nothing_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    code, output = launch("torchrun", 2, SCRIPT, tmp_path / "unbroken", answers)
    assert code == 0, output
    unbroken = told(answers, 2)
    directory, reached = tmp_path / "killed", 0
    soon = {"HF_LIFECYCLE_TIMEOUT": "6"}  # else torchrun waits 30 seconds for who waits for the killed one
    # Rank 1 dies writing its file, rank 0 while it commits, then both at once.
    for rank, operation in (("1", 4), ("0", 18), ("all", 5)):
        code, output = launch("torchrun", 2, SCRIPT, directory, answers, rank, str(operation), **soon)
        assert code != 0, f"rank {rank} was not killed"
        assert "Signal 9" in output or "SIGKILL" in output, output
        now = newest_step(directory)
        assert now >= reached, output
        reached = now
    assert 0 < reached < 10
    for file in answers.iterdir():
        file.unlink()
    code, output = launch("torchrun", 2, SCRIPT, directory, answers)
    assert code == 0, output
    for rank, (first, last) in enumerate(zip(unbroken, told(answers, 2), strict=True)):
        assert last["resumed"] == str(directory / f"checkpoint-{reached}")
        ours, theirs = ({**one, "resumed": None, "rows": None} for one in (first, last))
        assert theirs == ours, f"rank {rank}"
    _go_on_alone(tmp_path, unbroken, monkeypatch)


def _go_on_alone(tmp_path: Path, unbroken: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The unbroken run of two ranks from its last checkpoint but one, by one process, with twice the accumulation."""
    directory, answers = tmp_path / "unbroken", tmp_path / "alone"
    answers.mkdir()
    store.remove(directory / "checkpoint-10")
    with pytest.raises(ResumeMismatch, match="saved by 2 processes, and there are 1 now"):
        main(directory, answers)
    forget_last_attempt()
    with pytest.raises(ResumeMismatch, match=r"took 8 rows .* and would now take 4"):
        main(directory, answers, "continue")
    forget_last_attempt()
    monkeypatch.setenv("ACCUMULATION", "2")
    main(directory, answers, "continue")
    (alone,) = told(answers, 1)
    assert (alone["resumed"], alone["step"]) == (str(directory / "checkpoint-8"), 10)
    for step in ("8", "9"):
        together = sorted(unbroken[0]["rows"][step] + unbroken[1]["rows"][step])
        assert sorted(alone["rows"][step]) == together, f"step {step}"
    assert alone["rate"] == 1e-2 / (1 + 10)  # one step of the scheduler for each, where it was two
    assert unbroken[0]["rate"] == 1e-2 / (1 + 20)
    # The directory is this process's still, whose runs were refused before they could be closed.
    _go_on_as_two(Path(shutil.copytree(directory, tmp_path / "copied")), answers, alone)


def _go_on_as_two(directory: Path, answers: Path, alone: dict[str, Any]) -> None:
    """What one process left in the middle of an epoch, by two, which share the rest of that epoch's rows out."""
    code, output = launch("torchrun", 2, SCRIPT, directory, answers, ON_CHANGE="continue", STEPS="12", ACCUMULATION="1")
    assert code == 0, output
    assert "not exact: 2 processes instead of 1" in output
    both = told(answers, 2)
    assert [(one["resumed"], one["step"]) for one in both] == [(str(directory / "checkpoint-10"), 12)] * 2
    rows = [row for one in both for step in ("10", "11") for row in one["rows"][step]]
    rows += [row for step in ("8", "9") for row in alone["rows"][step]]
    assert sorted(rows) == sorted(Rows(32).labels.tolist())  # steps 8 to 11 are one epoch
    assert [len(both[rank]["rows"][step]) for rank in (0, 1) for step in ("10", "11")] == [4, 4, 4, 4]
    assert both[0]["rate"] == both[1]["rate"] == 1e-2 / (1 + 24)
