"""A loop that is broken off and resumed with the manager ends as the one that was never broken off, in every case."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from .loops.cases import CASES
from .loops.harness import LoopCase, aligned, run_broken, run_unbroken
from .outcome import compare
from .parameters import parameters


@pytest.mark.parametrize("case", parameters(CASES))
def test_resumed_loop_equals_unbroken_loop(case: LoopCase, tmp_path: Path) -> None:
    missing = [name for name in case.needs if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    unbroken = run_unbroken(case, tmp_path / "unbroken", "manager")
    resumed = run_broken(case, tmp_path / "broken", "manager", unbroken)
    assert compare(aligned(unbroken, resumed), resumed) == []
