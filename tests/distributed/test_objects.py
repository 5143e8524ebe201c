"""A user's object that is alike on all ranks is written once, by rank 0; one that is not, by each."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.launching import launch, told


@pytest.mark.slow
def test_object_that_is_alike_is_in_one_file_and_comes_back_on_each_rank(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.objects_script", tmp_path)
    assert code == 0, output
    for rank, found in enumerate(told(tmp_path, 2)):
        assert found["is_exact"]
        written = [["alike", "own"], []] if rank == 0 else [["own"], ["alike"]]
        assert found["files"] == [written, written]
        own = 8 * (1 + 0.5 * rank)
        assert found["values"] == [[8.0, 8.0], [own, own]] * 2
