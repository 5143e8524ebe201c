"""prune: what a policy does not keep goes, and what may be needed stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from trainer.runs import flip, reseal


def names(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def set_best(checkpoint: Path, best: str) -> None:
    path = checkpoint / "trainer_state.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"best_model_checkpoint": best}))
    reseal(checkpoint)


def test_prune_keeps_the_last(invoke: Any, run: Path) -> None:
    result = invoke("prune", run, "--keep-last", 2)
    assert result.exit_code == 0
    assert names(run) == ["checkpoint-6", "checkpoint-8"]
    assert "2 checkpoints removed" in result.stdout
    assert invoke("verify", run).exit_code == 0


def test_dry_run_tells_the_same_and_touches_nothing(invoke: Any, run: Path) -> None:
    dry = json.loads(invoke("prune", run, "--keep-last", 2, "--dry-run", "--json").stdout)
    assert len(names(run)) == 4
    wet = json.loads(invoke("prune", run, "--keep-last", 2, "--json").stdout)
    assert dry | {"dry_run": False} == wet
    assert [row["name"] for row in wet["checkpoints"] if row["removed"]] == ["checkpoint-4", "checkpoint-2"]


def test_newest_that_verifies_and_damaged_ones_are_never_removed(invoke: Any, run: Path) -> None:
    for step in (8, 6):
        flip(run / f"checkpoint-{step}" / "optimizer.pt")
    result = invoke("prune", run, "--keep-last", 1)
    assert result.exit_code == 0
    assert names(run) == ["checkpoint-4", "checkpoint-6", "checkpoint-8"]


def test_nothing_is_removed_where_nothing_verifies(invoke: Any, run: Path) -> None:
    for checkpoint in run.glob("checkpoint-*"):
        flip(checkpoint / "optimizer.pt")
    result = invoke("prune", run, "--keep-last", 1)
    assert result.exit_code == 1
    assert len(names(run)) == 4
    assert "every checkpoint is damaged" in result.stderr


def test_best_checkpoint_is_never_removed(invoke: Any, run: Path) -> None:
    set_best(run / "checkpoint-8", "elsewhere/checkpoint-2")
    assert invoke("prune", run, "--keep-last", 1).exit_code == 0
    assert names(run) == ["checkpoint-2", "checkpoint-8"]


def test_policies_are_combined(invoke: Any, run: Path) -> None:
    invoke("prune", run, "--keep-last", 1, "--keep-every", 4)
    assert names(run) == ["checkpoint-4", "checkpoint-8"]


@pytest.mark.parametrize(
    "options",
    [[], ["--keep-last", "0"], ["--keep-last", "[/x]"], ["--keep-best", "1"], ["--keep-every-hours", "1e300"]],
)
def test_wrong_use_removes_nothing(invoke: Any, run: Path, options: list[str]) -> None:
    assert invoke("prune", run, *options).exit_code == 2
    assert len(names(run)) == 4


def test_directory_of_a_living_run_is_left_alone(invoke: Any, run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_lifecycle.checkpoint.directory.lock import DirectoryLock\n"
        "DirectoryLock(Path(sys.argv[1])).acquire(); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run / ".lifecycle" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        result = invoke("prune", run, "--keep-last", 1)
        holder.communicate("")
    assert result.exit_code == 1
    assert f"in use by process {holder.pid}" in result.stderr
    assert len(names(run)) == 4
    assert invoke("prune", run, "--keep-last", 1).exit_code == 0
