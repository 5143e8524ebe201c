"""Where a torch lacks a name that is relied on, the plain way gives the same."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_lifecycle import torch_internals as ours


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_parts_of_a_module_are_those_that_torch_promises() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    bare: Any = SimpleNamespace(named_children=model.named_children)
    norm: Any = SimpleNamespace(named_parameters=model[1].named_parameters, named_buffers=model[1].named_buffers)
    assert ours.children_of(bare) == dict(ours.children_of(model))
    assert ours.own_parameters(norm) == dict(ours.own_parameters(model[1]))
    assert ours.buffers_of(norm) == dict(ours.buffers_of(model[1]))


def test_version_counts_writes_in_place_and_inference_has_none() -> None:
    tensor = torch.zeros(2)
    before = ours.version_counter(tensor)
    tensor += 1
    assert ours.version_counter(tensor) > before
    with torch.inference_mode():
        assert ours.version_counter(torch.zeros(2)) == -1


def test_storage_is_told_by_its_address() -> None:
    bare: Any = SimpleNamespace(data_ptr=lambda: 7)
    assert ours.storage_id(bare) == 7
    tensor = torch.zeros(2, 2)
    assert ours.storage_id(tensor) == ours.storage_id(tensor[1]) != ours.storage_id(torch.zeros(2))


@pytest.mark.usefixtures("process_group")
def test_ranks_meet_in_the_store_of_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(dist.group.WORLD, "get_group_store"):
        pytest.skip("this torch's groups show no store")
    monkeypatch.delattr(dist.distributed_c10d, "_get_default_store")
    store = ours.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"
