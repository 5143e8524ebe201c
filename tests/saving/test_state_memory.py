"""Copies of users' states are apart from them, and lie in memory that is kept, from the second one on."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.snapshots import state_copies
from hf_lifecycle.saving.snapshots.state_copies import StateMemory


@pytest.fixture
def memory() -> Iterator[StateMemory]:
    made = StateMemory()
    yield made
    made.release()


def state() -> dict[str, Any]:
    base = torch.randn(300, 400)
    weight = torch.randn(400, 300)
    return {
        "plain": weight,
        "again": [weight, 3],
        "turned": base.t(),
        "every_second": torch.randn(2 * 70_000)[::2],
        "bf16": torch.randn(200_000).to(torch.bfloat16),
        "parameter": torch.nn.Parameter(torch.randn(300, 300)),
        "conjugate": torch.randn(40_000, dtype=torch.complex64).conj(),
        "small": torch.tensor(3.5),
        "ordered": OrderedDict(step=torch.tensor(1)),
        "text": "a",
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return bool(one.dtype == other.dtype and torch.equal(one, other)) and not one.requires_grad
    if isinstance(one, dict):
        return type(one) is type(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(map(equal, one, other))
    return bool(one == other)


def places(copy: dict[str, Any]) -> list[int]:
    return [copy[name].data_ptr() for name in ("plain", "turned", "bf16")]


def test_each_copy_has_what_was_there_and_does_not_change_with_it(memory: StateMemory) -> None:
    live = state()
    for _ in range(3):
        before = {name: value.clone() for name, value in live.items() if isinstance(value, torch.Tensor)}
        copy = memory.copy_of(live)
        assert equal(copy, live)
        with torch.no_grad():
            for value in live.values():
                if isinstance(value, torch.Tensor):
                    value.add_(1)
        assert all(torch.equal(copy[name], value) for name, value in before.items())


def test_from_the_second_one_on_copies_lie_in_the_same_memory(memory: StateMemory) -> None:
    live = state()
    memory.copy_of(live)
    second = places(memory.copy_of(live))
    assert places(memory.copy_of(live)) == second


def test_state_that_has_grown_is_copied_and_finds_new_memory(memory: StateMemory) -> None:
    live = state()
    memory.copy_of(live)
    memory.copy_of(live)
    live["new"] = torch.randn(100_000)
    copies = [memory.copy_of(live) for _ in range(3)]
    assert equal(copies[-1], live)
    assert places(copies[1]) == places(copies[2])


@pytest.mark.parametrize("free", [0, 1 << 20])
def test_without_room_each_copy_has_memory_of_its_own(
    free: int, memory: StateMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_copies, "available_memory", lambda: free)
    live = state()
    copies = [memory.copy_of(live) for _ in range(3)]
    assert places(copies[1]) != places(copies[2])
    assert equal(copies[1], live)


def test_memory_that_cannot_be_made_costs_no_save(memory: StateMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(state_copies, "Arena", refuse)
    live = state()
    assert equal([memory.copy_of(live), memory.copy_of(live)][1], live)
