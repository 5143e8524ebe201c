"""Methods of a trainer that are replaced for a while are put back, in whatever order."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hf_lifecycle.hosts.trainer.method_patching import MethodPatches


class Host:
    def step(self) -> list[str]:
        return ["own"]


def _adding(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return lambda own: lambda: [name, *own()]


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_replacements_are_put_back_in_any_order(order: Sequence[str]) -> None:
    host = Host()
    made = {name: MethodPatches() for name in "abc"}
    for name, one in made.items():
        one.replace(host, "step", _adding(name))
    assert host.step() == ["c", "b", "a", "own"]
    left = ["c", "b", "a"]
    for name in order:
        made[name].put_back()
        left.remove(name)
        assert host.step() == [*left, "own"]
    assert "step" not in vars(host)
