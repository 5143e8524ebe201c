"""Small tensors of an accelerator come to host memory together; here host memory passes for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lifecycle.saving.snapshots.live import settled_copy
from hf_lifecycle.state import fingerprint, gathering
from hf_lifecycle.state.fingerprint import (
    FrozenDigests,
    leaf_digests,
    module_tensors,
    sample_digests,
    tensor_digest,
    tensor_digests,
)
from hf_lifecycle.state.gathering import gathered


class Cats(TorchDispatchMode):
    """Counts how often tensors are put together, once for each copy that waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


@pytest.fixture
def far(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gathering, fingerprint):
        monkeypatch.setattr(module, "is_on_accelerator", lambda tensor: True)


def tensors() -> dict[str, torch.Tensor]:
    base = torch.randn(6, 10)
    return {
        "plain": torch.randn(3, 4),
        "turned": base.t(),
        "every_second": base[:, ::2],
        "one": torch.tensor(3.5),
        "none": torch.empty(0, 3),
        "half": torch.randn(5).to(torch.bfloat16),
        "whole": torch.arange(7),
        "truth": torch.tensor([True, False]),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "parameter": nn.Parameter(torch.randn(2)),
        "large": torch.randn(1 << 19),
        "sparse": torch.eye(3).to_sparse(),
    }


@pytest.mark.usefixtures("far")
def test_what_was_gathered_is_what_was_there_and_large_or_sparse_is_left() -> None:
    given = tensors()
    found = gathered(given)
    assert given.keys() - found.keys() == {"large", "sparse"}
    for name, copy in found.items():
        assert (copy.dtype, copy.shape, copy.requires_grad) == (given[name].dtype, given[name].shape, False), name
        assert torch.equal(copy, given[name]), name


def test_what_lies_in_host_memory_is_left() -> None:
    assert gathered(tensors()) == {}


@pytest.mark.usefixtures("far")
def test_digests_are_those_of_each_tensor_alone() -> None:
    given = tensors()
    del given["sparse"]
    assert tensor_digests(given) == {name: tensor_digest(tensor) for name, tensor in given.items()}
    assert leaf_digests({"state": given}, "o") == {f"o.state.{name}": tensor_digest(one) for name, one in given.items()}


@pytest.mark.usefixtures("far")
def test_digests_of_many_tensors_take_one_copy_for_each_element_type() -> None:
    many = {str(number): torch.randn(4) for number in range(50)} | {"step": torch.tensor(1)}
    for digests in (tensor_digests, sample_digests):
        with Cats() as cats:
            digests(many)
        assert cats.count == 2


@pytest.mark.usefixtures("far")
def test_frozen_tensors_are_looked_at_together_and_digested_again_once_they_change() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10))).requires_grad_(False)
    known = FrozenDigests()
    first = known.of(module_tensors(model))
    with Cats() as cats:
        assert known.frozen(dict(model.named_parameters())) == first
    assert cats.count == 0  # none was digested, nor copied
    model[3].weight.data[0, 0] += 1
    changed = known.of(module_tensors(model))
    assert [name for name in first if changed[name] != first[name]] == ["3.weight"]
    assert changed["3.weight"] == tensor_digest(model[3].weight)


@pytest.mark.usefixtures("far")
def test_copy_of_a_state_is_apart_from_it_and_each_of_its_tensors_from_the_others() -> None:
    state = {"a": torch.zeros(3), "b": [torch.ones(2), {"c": torch.ones(2)}], "n": 3}
    copy = settled_copy(state)
    state["a"].fill_(9)
    copy["b"][0].fill_(7)
    assert copy["a"].tolist() == [0, 0, 0]
    assert copy["b"][1]["c"].tolist() == [1, 1]
    assert copy["a"].untyped_storage().nbytes() == 12
