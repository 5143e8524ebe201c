"""Kill one rank or all of them in the middle of a save: nothing that was committed is lost, and the end is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.store import latest_checkpoint

from .launching import launch, told

SCRIPT = "tests.distributed.loop_script"


def newest_step(directory: Path) -> int:
    found = latest_checkpoint(directory)
    return 0 if found is None else int(Path(found).name.partition("-")[2])


@pytest.mark.slow
def test_killed_ranks_lose_nothing_committed(tmp_path: Path) -> None:
    answers = tmp_path / "answers"
    answers.mkdir()
    code, output = launch("torchrun", 2, SCRIPT, tmp_path / "unbroken", answers)
    assert code == 0, output
    unbroken = told(answers, 2)
    directory, reached = tmp_path / "killed", 0
    # Rank 1 dies writing its file, rank 0 while it commits, then both at once.
    for rank, operation in (("1", 4), ("0", 18), ("all", 5)):
        code, output = launch("torchrun", 2, SCRIPT, directory, answers, rank, str(operation))
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
        assert {**last, "resumed": None} == {**first, "resumed": None}, f"rank {rank}"
