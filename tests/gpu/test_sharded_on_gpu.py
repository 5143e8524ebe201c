"""FSDP2 and DeepSpeed on accelerators, one or two of them: the cases of ``tests/distributed/sharded_cases.py``."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import launch, told
from tests.distributed.sharded_cases import ENGINE_LOOPS, ENGINES, LOOPS, SHARDED

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

_NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    "names",
    [
        [case.name for case in (*SHARDED, *LOOPS)],
        pytest.param([case.name for case in (*ENGINES, *ENGINE_LOOPS)], marks=_NEEDS_DEEPSPEED),
    ],
    ids=["fsdp2", "deepspeed"],
)
def test_model_that_is_shared_out_goes_on_exactly(names: list[str], tmp_path: Path) -> None:
    ranks = min(2, torch.cuda.device_count())
    code, output = launch(
        "torchrun", ranks, "tests.distributed.sharded_script", tmp_path, *names, ACCELERATE_USE_CPU="false"
    )
    assert code == 0, output
    assert told(tmp_path, ranks) == [{name: [] for name in names}] * ranks
