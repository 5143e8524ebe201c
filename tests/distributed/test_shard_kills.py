"""A sharded training is killed or stopped at any moment of a background save, and nothing committed is lost."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import preloaded
from tests.distributed.launching import ROOT

SHARDED, FULL = ("loop-sharded", "trainer-sharded"), ("loop-full", "trainer-full")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "kinds", "kills"),
    [
        (2, ("loop-sharded", "trainer-full"), 2),  # one in each stage of a save
        (4, ("loop-full",), 2),
        pytest.param(2, (*SHARDED, *FULL), 16, marks=pytest.mark.exhaustive),
        pytest.param(4, (*SHARDED, *FULL), 12, marks=pytest.mark.exhaustive),
    ],
)
def test_rank_killed_in_the_copy_the_writing_or_the_merge_loses_nothing_committed_and_the_run_ends_the_same(
    ranks: int, kinds: tuple[str, ...], kills: int, tmp_path: Path
) -> None:
    how = ["--ranks", str(ranks), "--kills", str(kills), "--kind", *kinds]
    command = [sys.executable, "-m", "tests.crash.kill_ranks", str(tmp_path), *how]
    ended = preloaded.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for kind in kinds:
        assert f"{kind}: {kills} kills of {ranks} ranks" in ended.stdout, ended.stdout
