"""FSDP2 and DeepSpeed on accelerators, one or two of them: the cases of ``tests/distributed/sharded_cases.py``.

Where only the course of the tests is tried, one rank on a CPU runs the first case of each kind.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.distributed.launching import launch, told
from tests.distributed.sharded_cases import ENGINE_LOOPS, ENGINES, LOOPS, SHARDED
from tests.gpu.device import HAS_CUDA, on_device

pytestmark = on_device

_CASES = None if HAS_CUDA else 1
_NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@pytest.mark.parametrize(
    "names",
    [
        [case.name for case in (*SHARDED[:_CASES], *LOOPS[:_CASES])],
        pytest.param([case.name for case in (*ENGINES, *ENGINE_LOOPS)], marks=_NEEDS_DEEPSPEED),
    ],
    ids=["fsdp2", "deepspeed"],
)
def test_model_that_is_shared_out_goes_on_exactly(names: list[str], tmp_path: Path) -> None:
    ranks = max(1, min(2, torch.cuda.device_count()))
    where = {"ACCELERATE_USE_CPU": "false" if HAS_CUDA else "true", "NCCL_SOCKET_IFNAME": "lo"}
    code, output = launch("torchrun", ranks, "tests.distributed.sharded_script", tmp_path, *names, **where)
    assert code == 0, output
    assert told(tmp_path, ranks) == [{name: [] for name in names}] * ranks
