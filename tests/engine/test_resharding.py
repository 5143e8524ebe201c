"""Tensors that other ranks had in other parts: cut anew, and refused where they cannot be compared."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_lifecycle.engine.resharding import gradients_of_all, obstacle_to_resharding

WHOLE = torch.arange(14.0).reshape(7, 2)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def model_of(tensor: torch.Tensor, mesh: DeviceMesh, placements: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(DTensor.from_local(tensor, mesh, placements))
    return model


@pytest.mark.parametrize("saved_by", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_gradient_of_a_sharded_parameter_is_cut_as_fsdp_cuts_it(saved_by: int, world_size: int, one_rank: None) -> None:
    live = dict(model_of(WHOLE, DeviceMesh("cpu", [0]), [Shard(0)]).named_parameters())

    def parts(ranks: int) -> list[torch.Tensor]:
        cut = list(torch.chunk(WHOLE, ranks))
        return cut + [WHOLE[:0]] * (ranks - len(cut))

    saved = [{"weight": one} for one in parts(saved_by)]
    found = [gradients_of_all(saved, live, rank, world_size)["weight"] for rank in range(world_size)]
    assert all(torch.equal(one, part) for one, part in zip(found, parts(world_size), strict=True))


def test_gradient_of_a_parameter_that_all_ranks_have_becomes_the_mean() -> None:
    saved = [{"weight": torch.tensor([1.0, 3.0])}, {"weight": torch.tensor([3.0, 9.0])}]
    assert gradients_of_all(saved, {"weight": WHOLE}, 2, 4)["weight"].tolist() == [2.0, 6.0]


def test_what_cannot_be_compared_with_other_ranks_is_named(one_rank: None) -> None:
    line, plane = DeviceMesh("cpu", [0]), DeviceMesh("cpu", [[0]])
    assert obstacle_to_resharding([model_of(WHOLE, line, [Shard(0)])], 1, None) is None
    assert obstacle_to_resharding([torch.nn.Linear(2, 2)], 2, SimpleNamespace(value="MULTI_GPU")) is None
    several = obstacle_to_resharding([model_of(WHOLE, plane, [Replicate(), Shard(0)])], 1, None)
    assert several is not None
    assert "in another way than over all ranks (FSDP2)" in several
    some = obstacle_to_resharding([model_of(WHOLE, line, [Shard(0)])], 2, None)
    assert some is not None
    assert "over some of the ranks only" in some
    flat = obstacle_to_resharding([torch.nn.Linear(2, 2)], 2, SimpleNamespace(value="FSDP"))
    assert flat is not None
    assert flat.startswith("FSDP1 gives each rank")
