"""Gradients that data parallelism sums: a hook that keeps something between steps is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from hf_lifecycle.state.buckets import Buckets
from tests.listening import listening
from tests.processes import in_child


@pytest.mark.parametrize("is_given_wrapped", [True, False])
@pytest.mark.parametrize(
    ("state", "hook", "told"),
    [(lambda: PowerSGDState(None), powerSGD_hook, "PowerSGDState"), (lambda: None, fp16_compress_hook, "")],
    ids=["with a state", "without one"],
)
def test_hook_that_keeps_a_state_is_named_once(is_given_wrapped: bool, state: Any, hook: Any, told: str) -> None:
    def work() -> list[str]:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        model = torch.nn.Linear(2, 1)
        wrapper = DistributedDataParallel(model)
        wrapper.register_comm_hook(state(), hook)
        buckets = Buckets()
        with listening() as said:
            for _ in range(2):
                buckets.watch(wrapper if is_given_wrapped else model)
                wrapper(torch.ones(1, 2))
                buckets.begin_anew()
        dist.destroy_process_group()
        return said

    code, lines = in_child(work)
    assert code == 0
    assert len(lines) == bool(told)
    assert all(f"has a state ({told}) that no checkpoint contains" in line for line in lines)
