"""Trainer on several ranks: broken off and resumed, every rank ends bit for bit as if it had not been."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of, staging_folder
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree

from .cases import OWN
from .launching import launch, told

pytestmark = pytest.mark.slow

SHARED = ("weights", "optimizer", "scheduler", "progress")  # what is the same on every rank


def train(launcher: Any, ranks: int, folder: Path, *names: str) -> list[dict[str, Any]]:
    """Launch the cases and return what each rank tells of each, nothing of which may differ."""
    code, output = launch(launcher, ranks, "tests.distributed.exactness", folder, *names)
    assert code == 0, output
    by_rank = told(folder, ranks)
    differing = {
        f"{name}, rank {rank}": facts["differences"]
        for rank, one in enumerate(by_rank)
        for name, facts in one.items()
        if facts["differences"]
    }
    assert differing == {}
    assert [sorted(one) for one in by_rank] == [sorted(names)] * len(by_rank)
    return by_rank


def digests_in(checkpoint: Path, rank: int) -> list[str]:
    weights = read_tree(rank_file(checkpoint, rank), kind=TRAINER)["parts"]["weights"]
    return [*weights["model"].values(), *weights["optimizer"].values()]


def test_every_rank_resumes_exactly_under_torchrun(tmp_path: Path) -> None:
    names = [case.name for case in OWN if case.name not in ("ranks_stopping", "ranks_dispatch")]
    first, second = train("torchrun", 2, tmp_path, *names)
    for name in names:
        alike = [kind for kind in SHARED if (name, kind) != ("ranks_norm", "weights")]  # the buffers are a rank's own
        assert {kind: first[name]["digests"][kind] for kind in alike} == {
            kind: second[name]["digests"][kind] for kind in alike
        }, name
        assert first[name]["digests"]["batches"] != second[name]["digests"]["batches"], name
    for name in names:
        place = tmp_path / name / "broken" / "out"
        for _, checkpoint in checkpoints_in(place):
            assert problems_of(checkpoint, full=True) == []
            manifest = read_manifest(checkpoint)
            assert manifest.world_size == 2
            assert all(rank_file(checkpoint, rank).is_file() for rank in (0, 1))
            assert {"rng_state_0.pth", "rng_state_1.pth"} <= {entry.path for entry in manifest.files}
            # A rank that has a copy of what rank 0 trains is not kept by digests of all of it.
            samples = [any(one.startswith("~") for one in digests_in(checkpoint, rank)) for rank in (0, 1)]
            assert samples == [False, name in names], checkpoint
        assert list(staging_folder(place).iterdir()) == []


def test_every_rank_stops_where_rank_0_says(tmp_path: Path) -> None:
    first, second = train("accelerate", 2, tmp_path, "ranks_stopping", "ranks_dispatch")
    state = (tmp_path / "ranks_stopping" / "whole" / "out" / "checkpoint-8" / "trainer_state.json").read_text()
    assert json.loads(state)["best_metric"] == 0.4
    assert first["ranks_stopping"]["digests"]["progress"] == second["ranks_stopping"]["digests"]["progress"]
    assert first["ranks_stopping"]["digests"]["weights"] == second["ranks_stopping"]["digests"]["weights"]
    assert not (tmp_path / "ranks_stopping" / "whole" / "out" / "checkpoint-12").exists()


def test_four_ranks_resume_exactly(tmp_path: Path) -> None:
    train("torchrun", 4, tmp_path, "ranks_rows_2", "ranks_stream_shard")
