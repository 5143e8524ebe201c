"""The examples that run on several ranks, from a directory of their own, broken off and not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import preloaded

from .launching import ROOT, launch

SCRIPT = ROOT / "examples" / "accelerate_loop.py"


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


@pytest.mark.slow
def test_accelerate_loop_ends_alike_killed_and_not_alone_and_on_two_ranks(tmp_path: Path) -> None:
    arguments = ("--epochs", "2", "--save-every", "10")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def alone(folder: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SCRIPT), "--output-dir", folder, *arguments]
        return preloaded.Popen(
            command, cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    whole, _ = alone("whole").communicate(timeout=200)
    killed = alone("killed")
    while killed.poll() is None and not (tmp_path / "killed" / "checkpoint-20").exists():
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again, _ = alone("killed").communicate(timeout=200)
    assert "killed/checkpoint-" in again.partition("resumed from ")[2].partition("\n")[0]
    assert last_line(again) == last_line(whole)
    assert last_line(whole).startswith("step 94, weights ")
    code, output = launch("accelerate", 2, SCRIPT, "--output-dir", "both", *arguments, cwd=tmp_path)
    assert code == 0, output
    assert "step 48, weights " in output
