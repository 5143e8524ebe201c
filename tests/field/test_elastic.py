"""``torchrun --max-restarts`` alone brings a run whose ranks are killed to the bits of the uninterrupted one."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded
from tests.distributed.launching import ROOT, launch, told

pytestmark = pytest.mark.slow

SCRIPT = "tests.field.elastic_script"
SOON = {"HF_LIFECYCLE_TIMEOUT": "8"}  # who waits for a killed rank ends sooner than torchrun ends it (30 seconds)


def run(kind: str, ranks: int, folder: Path, plan: list[str]) -> tuple[list[dict[str, Any]], str]:
    """What each rank has at its end, after one launch, and what was printed."""
    folder.mkdir()
    arguments = (kind, folder / "run", folder, ",".join(plan))
    code, output = launch("torchrun", ranks, SCRIPT, *arguments, restarts=len(plan), **SOON)
    assert code == 0, output
    assert len(list(folder.glob("killed-*"))) == len(plan), output
    ended = told(folder, ranks)
    for one in ended:
        if kind == "loop":
            del one["rows"], one["resumed"]  # of the last attempt
    return ended, output


def quiet(output: str) -> bool:
    """Whether no wait for other ranks made torch's store complain."""
    return "waitForWorkers" not in output and "wait timeout" not in output


_IN_A_NOTEBOOK = """
import sys
from accelerate import Accelerator, debug_launcher
from hf_lifecycle import TrainingStateManager
from hf_lifecycle.processes.ranks import Ranks


def cell(folder):
    accelerator = Accelerator(cpu=True)
    for training in ("first", "second"):
        manager = TrainingStateManager(accelerator, f"{folder}/{training}")
        manager.save()
        manager.close()
    last = Ranks.current().broadcast("the last answer", what="the end")  # and rank 0 ends at once, with the store
    print("TOLD", last, flush=True)


if __name__ == "__main__":
    for number in range(2):
        debug_launcher(cell, (f"{sys.argv[1]}/{number}",), num_processes=2)
"""


def test_cells_of_a_notebook_launch_one_training_after_another(tmp_path: Path) -> None:
    script = tmp_path / "cells.py"
    script.write_text(_IN_A_NOTEBOOK)
    env = os.environ | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "HF_LIFECYCLE_TIMEOUT": "60"}
    command = [sys.executable, str(script), str(tmp_path)]
    ended = preloaded.run(command, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("the last answer") == 4, ended.stdout


@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_ranks_killed_at_a_step_and_in_saves_over_three_restarts_end_as_if_never_killed(
    kind: str, tmp_path: Path
) -> None:
    whole, _ = run(kind, 2, tmp_path / "whole", [])
    # Rank 1 between saves; rank 0 amid its files, and late in a commit; rank 1 in writing its own.
    ended, output = run(kind, 2, tmp_path / "killed", ["1:step:3", "0:file:14", "1:file:2"])
    assert ended == whole
    assert quiet(output), output


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["trainer", "loop"])
def test_any_rank_killed_anywhere_over_three_restarts(kind: str, ranks: int, seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    plan = []
    for _ in range(3):
        rank = draw.randrange(ranks)
        files = draw.randrange(1, 40 if rank == 0 else 5)
        plan.append(f"{rank}:step:{draw.randrange(1, 4)}" if draw.random() < 0.4 else f"{rank}:file:{files}")
    whole, _ = run(kind, ranks, tmp_path / "whole", [])
    ended, output = run(kind, ranks, tmp_path / "killed", plan)
    assert ended == whole, plan
    assert quiet(output), output
