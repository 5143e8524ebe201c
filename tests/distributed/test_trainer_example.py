"""The example of several processes: killed with all its ranks and started again, it ends with the same weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import preloaded

from .launching import ROOT

pytestmark = pytest.mark.slow
COMMAND = ["sh", str(ROOT / "examples" / "trainer_ddp.sh"), "--max-steps", "40", "--output-dir"]


def environment(**variables: str) -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **variables}


def start(place: Path) -> subprocess.Popen[str]:
    # From elsewhere: nothing may depend on where it is started.
    return subprocess.Popen(
        [*COMMAND, str(place)],
        cwd=place.parent,
        env=environment(PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ends(place: Path) -> list[str]:
    """What each rank says at the end, where Python is given what the script gives it, in a forked process."""
    told = subprocess.run([*COMMAND, str(place)], env=environment(PYTHON="echo"), capture_output=True, text=True)
    run = preloaded.run(
        [sys.executable, *told.stdout.split()],
        launches=True,
        cwd=place.parent,
        env=environment(PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout
    return sorted(re.findall(r"rank \d of 2: step 40, [0-9a-f]{16}", run.stdout))


def test_killed_and_started_again_it_ends_with_the_same_weights_on_both_ranks(tmp_path: Path) -> None:
    whole = ends(tmp_path / "whole")
    assert len({line.partition(": ")[2] for line in whole}) == 1
    assert len(whole) == 2
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint-20").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert (tmp_path / "run" / "checkpoint-20").exists()
    assert ends(tmp_path / "run") == whole
