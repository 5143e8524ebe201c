"""A replica keeps samples: rank 0's digests prove what it loaded, and the samples that it had been alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from hf_lifecycle.state.replicas import (
    is_replica,
    optimizer_samples,
    tensor_samples,
    unlike_rank_0,
    whole_digests,
)


def trained(seed: int = 0) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(40, 60), torch.nn.BatchNorm1d(60))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(8, 40)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def whole(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    digests = {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}
    return {"model": digests, "optimizer": leaf_digests(optimizer.state_dict(), "optimizer"), "gradients": {}}


def samples(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"model": tensor_samples(model), "optimizer": optimizer_samples(state, "optimizer"), "gradients": {}}


def test_rank_0s_digests_take_the_place_of_samples_and_the_ranks_own_buffers_stay() -> None:
    one, other = trained(), trained()
    other[0].get_buffer("1.running_mean").add_(1)
    found = whole_digests(samples(*other), lambda: whole(*one))
    assert found["optimizer"] == whole(*one)["optimizer"]
    own = {"1.running_mean": tensor_digest(other[0].get_buffer("1.running_mean"))}
    assert found["model"] == whole(*one)["model"] | own
    assert found["gradients"] == {}


def test_rank_0_is_not_asked_where_there_are_no_samples() -> None:
    digests = whole(*trained())
    assert whole_digests(digests, lambda: pytest.fail("asked")) is digests
    assert unlike_rank_0(digests, lambda: pytest.fail("asked"), 1) == []


def test_replica_that_had_gone_its_own_way_is_named() -> None:
    saved = samples(*trained(seed=1))  # what rank 1 had
    said = unlike_rank_0(saved, lambda: samples(*trained(seed=0)), 1)
    assert "0.weight was not the same on rank 0 and rank 1 when it was saved" in said
    assert any(sentence.startswith("optimizer.state.0.exp_avg ") for sentence in said)
    assert unlike_rank_0(saved, lambda: samples(*trained(seed=1)), 1) == []


@pytest.mark.parametrize(
    ("rank", "kind", "expected"),
    [
        (1, DistributedType.MULTI_CPU, True),
        (1, DistributedType.MULTI_GPU, True),
        (0, DistributedType.MULTI_GPU, False),
        (1, DistributedType.FSDP, False),
        (1, DistributedType.DEEPSPEED, False),
        (1, DistributedType.NO, False),
        (1, None, False),
    ],
)
def test_only_data_parallelism_makes_replicas(rank: int, kind: Any, expected: bool) -> None:
    assert is_replica(Ranks(rank, 2), kind, torch.nn.Linear(2, 2)) is expected


def test_model_that_is_shared_out_is_no_replica() -> None:
    class Component(torch.nn.Parameter):
        def to_local(self) -> torch.Tensor:
            return self

    model = torch.nn.Module()
    model.weight = Component(torch.ones(2))
    assert not is_replica(Ranks(1, 2), DistributedType.MULTI_GPU, model)
