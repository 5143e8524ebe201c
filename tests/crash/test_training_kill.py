"""A real training is killed in its saves, and nothing that was committed is lost. ``make crash`` kills it 200 times."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests import preloaded

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("host", ["Trainer", "loop", "waiting-loop"])
def test_killed_in_a_save_the_run_goes_on_from_the_newest_whole_checkpoint_and_ends_the_same(
    host: str, tmp_path: Path
) -> None:
    how = ["--host", host, "--every", "4", "--random", "4"]
    command = [sys.executable, "-m", "tests.crash.kill_training", str(tmp_path), *how]
    ended = preloaded.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    kills = re.search(r"^(\d+) kills at requests", ended.stdout, re.MULTILINE)
    assert kills is not None
    assert int(kills[1]) >= 8
