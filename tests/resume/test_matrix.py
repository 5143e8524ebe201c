"""A run that is broken off and resumed with the callback ends as the run that was never broken off, in every case."""

from __future__ import annotations

from pathlib import Path

import pytest

from .cases import CASES
from .harness import Case, missing_packages, run_broken, run_unbroken
from .outcome import compare
from .parameters import parameters


@pytest.mark.parametrize("case", parameters(CASES))
def test_resumed_run_equals_unbroken_run(case: Case, tmp_path: Path) -> None:
    missing = missing_packages(case)
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    unbroken = run_unbroken(case, tmp_path / "unbroken" / "run", "callback")
    resumed = run_broken(case, tmp_path / "broken" / "run", "callback")
    assert compare(unbroken, resumed) == []
