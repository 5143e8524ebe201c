"""The script that runs everything on a machine with a GPU: what hangs is cut off, and the rest is written down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.gpu.parts import ROOT, Component, planned, run, written

HERE = {"card": "a card", "cuda": "13.0", "cpus": 2, "python": "3.12", "versions": {"torch": "2.11"}}
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
print("tests/gpu/test_a.py::test_done PASSED")
print("tests/gpu/test_a.py::test_hangs", child.pid, flush=True)
time.sleep(60)
"""


def test_part_that_hangs_is_cut_off_with_what_it_started_and_keeps_what_it_told(tmp_path: Path) -> None:
    part = Component("hangs", ["-c", HANGS, "pytest"], 1.5)
    began = time.monotonic()
    run(part, tmp_path, 100, dict(os.environ))
    assert time.monotonic() - began < 20
    (name, pid), *_ = [name.split() for name, state in part.tests.items() if state == "begun"]
    assert (part.state, name, part.tests["test_a::test_done"]) == ("over its limit", "test_a::test_hangs", "passed")
    assert not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE


def test_part_for_which_no_time_is_left_does_not_begin(tmp_path: Path) -> None:
    part = Component("late", ["-c", "raise SystemExit", "pytest"], 10)
    run(part, tmp_path, -1, dict(os.environ))
    assert (part.state, part.seconds) == ("left out", 0.0)


def test_table_has_card_states_failures_and_figures() -> None:
    failed = Component(
        "Trainer", [], 1, "failed", 3.0, {"test_a::test_b": "failed", "test_a::test_c": "passed"}, output="E!"
    )
    stall = Component("stall 1 GB", [], 1, "passed", 9.0, table=["| 1 GB | stock | 5 ms |"])
    table = written(HERE, [failed, stall])
    assert "card: a card, CUDA 13.0" in table
    assert "| Trainer | failed | 1 | 1 | 0 | 3 |" in table
    assert "| 1 GB | stock | 5 ms |" in table
    assert "Trainer: test_a::test_b: failed" in table
    assert "E!" in table


@pytest.mark.parametrize("dry_run", [True, False])
def test_every_test_file_of_the_folder_is_in_a_part(dry_run: bool) -> None:
    last, beside = planned(dry_run=dry_run)
    named = {one for group in [*beside, last] for part in group for one in part.arguments if one.startswith("tests/")}
    assert named == {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("test_*_on_gpu.py")}
    most = sum(max(part.limit for part in group) for group in beside) + sum(part.limit for part in last)
    assert dry_run or most < 600  # and the limit in all cuts it


def test_wheels_are_of_what_is_pinned_and_only_missing_ones_are_installed(tmp_path: Path) -> None:
    script = (ROOT / "tests" / "gpu" / "wheels.sh").read_text()
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    names = [
        name
        for kind in ("PURE", "COMPILED")
        for name in re.findall(rf'^{kind}="(.*)"', script, re.MULTILINE)[0].split()
    ]
    assert names
    assert set(names) <= set(pinned)
    for name in ("pytest-1-py3-none-any.whl", "no_such_package-1-py3-none-any.whl"):
        (tmp_path / name).touch()
    told = subprocess.run([sys.executable, ROOT / "tests/gpu/missing.py", tmp_path], capture_output=True, text=True)
    assert told.stdout.split() == [str(tmp_path / "no_such_package-1-py3-none-any.whl")]
