"""Each benchmark runs to its end, on sizes of which no figure means anything; no other test runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TINY = {
    "commit": ["--sizes", "0.001", "--rounds", "1"],
    "exchanges": ["--ranks", "2", "--simulated", "8"],
    "overhead": ["--steps", "200", "--rounds", "1"],
    "resume": ["--rounds", "1", "--samples", "1000"],
    "sharded": ["--size", "0.01", "--rounds", "1", "--saves", "1", "--steps", "4"],
    "stall": ["--sizes", "0.01", "--rounds", "1", "--saves", "1", "--steps", "4", "--fork"],
}


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py")))
def test_benchmark_runs_to_its_end(name: str) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), *TINY[name]]
    run = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    assert any(letter.isdigit() for letter in run.stdout)
