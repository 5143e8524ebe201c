"""Digests differ where a bit differs, and are the same on every machine."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hf_lifecycle.processes import cores
from hf_lifecycle.state.fingerprint import (
    FrozenDigests,
    digests_on_cores,
    leaf_digests,
    module_tensors,
    tensor_digest,
    tensor_digests,
)


def test_a_digest_is_the_same_for_ever() -> None:
    assert tensor_digest(torch.arange(6, dtype=torch.float32).reshape(2, 3)) == "eaa684fa1ccbbbc42d26877c0423cd51"


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn],
)
def test_every_dtype_has_a_digest_of_its_own(dtype: torch.dtype) -> None:
    digest = tensor_digest(torch.ones(3).to(dtype))
    assert len(digest) == 32
    assert digest != tensor_digest(torch.ones(3))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(0), torch.zeros(0, 1)),
        (torch.zeros(1), torch.zeros(())),
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (torch.tensor(1.0), torch.tensor(1.0 + 2**-23)),
        (torch.zeros(4, dtype=torch.int32), torch.zeros(4, dtype=torch.float32)),
    ],
)
def test_dtype_shape_and_every_bit_count(one: torch.Tensor, two: torch.Tensor) -> None:
    assert tensor_digest(one) != tensor_digest(two)


def test_how_a_tensor_lies_in_memory_does_not_count() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    for view in (base.t(), base[:, ::2], base[1:2], base[:1, :1], base[2, 3], base.expand(2, 4, 6)):
        assert tensor_digest(view) == tensor_digest(view.clone(memory_format=torch.contiguous_format))
    complex_numbers = torch.randn(3, dtype=torch.complex64)
    assert tensor_digest(complex_numbers.conj()) == tensor_digest(complex_numbers.conj().resolve_conj().clone())
    assert tensor_digest(torch.ones(2, requires_grad=True)) == tensor_digest(torch.ones(2))


def test_nan_equals_itself() -> None:
    assert tensor_digest(torch.tensor([math.nan])) == tensor_digest(torch.tensor([math.nan]))
    assert leaf_digests({"x": math.nan}, "s") == leaf_digests({"x": math.nan}, "s")


def test_leaves_are_named_by_their_path() -> None:
    tree = {"state": {0: {"exp": torch.ones(1)}}, "groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}
    assert list(leaf_digests(tree, "o")) == [
        "o.state.0.exp",
        "o.groups.0.lr",
        "o.groups.0.betas.0",
        "o.groups.0.betas.1",
    ]


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (1, True),
        (1, 1.0),
        (0.1, 0.1 + 2**-56),
        ("1", 1),
        (None, "None"),
        (b"a", "a"),
        (np.float32(1), np.float64(1)),
        (np.zeros(2), np.zeros((1, 2))),
        (np.zeros(2), torch.zeros(2)),
    ],
)
def test_leaves_that_differ_in_type_or_bits_differ(one: Any, two: Any) -> None:
    assert leaf_digests({"x": one}, "s") != leaf_digests({"x": two}, "s")


def test_kinds_of_containers_and_addresses_do_not_count() -> None:
    assert leaf_digests(OrderedDict(a=[1, 2]), "s") == leaf_digests({"a": (1, 2)}, "s")
    assert leaf_digests({"f": lambda: 1}, "s") == leaf_digests({"f": lambda: 2}, "s")


def test_several_threads_give_the_same_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_WORTH", 0)
    monkeypatch.setattr(cores, "_cores", lambda: 4)
    tensors = {f"t{number}": torch.full((number, 3), float(number)).T for number in range(50)}
    tensors["conj"] = torch.tensor([1 + 2j]).conj()
    assert list(digests_on_cores(tensors).items()) == list(tensor_digests(tensors).items())


class Tied(nn.Module):
    """A parameter under two names, and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2, bias=False)
        self.two = nn.Linear(2, 2, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("left_out", torch.zeros(1), persistent=False)


def test_a_module_gives_each_tensor_once_buffers_included() -> None:
    assert list(module_tensors(Tied())) == ["one.weight", "kept", "left_out"]


def change_by_storage(weight: nn.Parameter) -> None:
    weight.data = weight.data.clone() + 1


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(1),
        lambda weight: weight.detach().mul_(2),
        change_by_storage,
        lambda weight: weight.data.__setitem__((0, 0), 5.0),
    ],
    ids=["data", "in place", "storage", "one element"],
)
def test_a_frozen_tensor_that_changed_is_digested_again(change: Any) -> None:
    module = nn.Linear(4, 4)
    module.requires_grad_(False)
    digests = FrozenDigests()
    before = digests.of(module_tensors(module))
    assert digests.of(module_tensors(module)) == before
    change(module.weight)
    after = digests.of(module_tensors(module))
    assert after["weight"] == tensor_digest(module.weight) != before["weight"]
    assert after["bias"] == before["bias"]


def test_a_frozen_tensor_in_host_memory_is_digested_whole_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_lifecycle.state import fingerprint

    sizes: list[int] = []

    def counted(tensor: torch.Tensor) -> str:
        sizes.append(tensor.numel())
        return tensor_digest(tensor)

    monkeypatch.setattr(fingerprint, "tensor_digest", counted)
    module = nn.Linear(200, 100)
    module.weight.requires_grad_(False)
    digests = FrozenDigests()
    digests.of(module_tensors(module))
    digests.of(module_tensors(module))
    assert sizes.count(20_000) == 2
