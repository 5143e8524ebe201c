"""Under FSDP2, on CPUs: Trainer with the callback and loops with the manager are exact on each rank."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of
from hf_lifecycle.checkpoint.files.additions import rank_file

from .launching import launch, told
from .sharded_cases import ENGINE_LOOPS, ENGINES, LOOPS, SHARDED

pytestmark = pytest.mark.slow

SHARDS = {"pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "pytorch_model_fsdp_0/__1_0.distcp"}


def test_model_that_is_shared_out_is_saved_proved_and_goes_on_exactly(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.sharded_script", tmp_path)
    assert code == 0, output
    first, second = told(tmp_path, 2)
    lost, full = [[one.pop(name) for one in (first, second)] for name in ("lost", "full")]
    assert first == second == {case.name: [] for case in (*SHARDED, *LOOPS)}
    assert [name for name, _ in lost] == ["RankFailed", "ResumeMismatch"]
    assert all("layers.0.weight differs from what was saved" in text for _, text in lost)
    assert full[0] == full[1]
    for steps, (why,) in full[0]:
        assert steps == [7, 6, 2]
        assert "rank 1: " in why
        assert "No space left on device: " in why
        assert "__1_0.distcp'" in why
    for name in first:
        run = tmp_path / name / "broken"
        for _, checkpoint in checkpoints_in(run / "out" if name.startswith("fsdp_t") else run):
            assert problems_of(checkpoint, full=True) == []
            assert all(rank_file(checkpoint, rank).is_file() for rank in (0, 1))
            files = {entry.path for entry in read_manifest(checkpoint).files}
            assert (files >= SHARDS) == (not name.endswith("full"))
            assert ("pytorch_model_fsdp.bin" in files) == name.endswith("full")


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")
def test_deepspeed_engine_is_saved_and_goes_on_exactly(tmp_path: Path) -> None:
    names = [case.name for case in (*ENGINES, *ENGINE_LOOPS)]
    code, output = launch("torchrun", 2, "tests.distributed.sharded_script", tmp_path, *names, is_forked=False)
    assert code == 0, output
    assert told(tmp_path, 2) == [{name: [] for name in names}] * 2
    assert "before it could be verified" not in output
    for name in names:
        run = tmp_path / name / "broken"
        for _, checkpoint in checkpoints_in(run / "out" if not name.endswith("loop") else run):
            assert problems_of(checkpoint, full=True) == []
            assert all(rank_file(checkpoint, rank).is_file() for rank in (0, 1))
            assert any(entry.path.endswith("optim_states.pt") for entry in read_manifest(checkpoint).files)
