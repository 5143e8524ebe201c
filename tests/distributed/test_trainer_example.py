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

from .launching import ROOT

pytestmark = pytest.mark.slow
COMMAND = ["sh", str(ROOT / "examples" / "trainer_ddp.sh"), "--max-steps", "40", "--output-dir"]


def start(place: Path) -> subprocess.Popen[str]:
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    # From elsewhere: nothing may depend on where it is started.
    return subprocess.Popen(
        [*COMMAND, str(place)],
        cwd=place.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ends(place: Path) -> list[str]:
    """What each rank says at the end."""
    process = start(place)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return sorted(re.findall(r"rank \d of 2: step 40, [0-9a-f]{16}", output))


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
