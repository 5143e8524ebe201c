"""The walk that a save is stopped for gives what torch's own gives, in the same order."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_lifecycle.state.modules import ModelWalks, kept_of_model, kept_within_look, modules_of, parameters_of


class Shared(nn.Module):
    """A module and a parameter under two names each, an empty place, and a module that has itself as a child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        self.again = self.first[1]
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.first[0].weight
        self.register_module("none", None)
        self.register_parameter("nothing", None)
        self.scale = nn.Parameter(torch.ones(1))
        self.first.add_module("up", self)


def test_modules_and_parameters_are_those_of_torch_in_the_same_order() -> None:
    model = Shared()
    assert modules_of(model) == list(model.named_modules())
    found, torchs = parameters_of(model), dict(model.named_parameters())
    assert list(found) == list(torchs)
    assert all(found[name] is one for name, one in torchs.items())


def test_model_is_gone_through_once_within_the_block() -> None:
    model, other, walks = Shared(), Shared(), ModelWalks()
    with walks.once():
        modules, parameters = modules_of(model), parameters_of(model)
        assert modules_of(model) is modules
        assert parameters_of(model) is parameters
        assert modules_of(other) == list(other.named_modules())
        with walks.once():
            assert modules_of(model) is modules
        with ModelWalks().once():
            assert modules_of(model) is not modules
        assert modules_of(model) is modules
    assert modules_of(model) is not modules
    with walks.once():
        assert modules_of(model) is modules, "nothing has changed"


def _renamed(model: Any) -> None:
    model.first.other = model.first._modules.popitem()[1]


CHANGES: list[Callable[[Any], object]] = [
    lambda model: setattr(model, "more", nn.Linear(1, 1)),
    lambda model: delattr(model, "tied"),
    lambda model: setattr(model.tied, "weight", nn.Parameter(torch.ones(2, 2))),
    lambda model: model.first[1].register_buffer("count", torch.zeros(1)),
    lambda model: model.first[1][0].register_forward_hook(lambda *_: None),
    lambda model: setattr(model.tied, "forward", lambda x: x),
    lambda model: setattr(model.first[0], "rate", "fast"),
    _renamed,
]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_in_a_model_is_found_in_the_next_block(change: Callable[[Any], object]) -> None:
    model, walks = Shared(), ModelWalks()
    model.first[0].rate = 1000.5
    with walks.once():
        before = modules_of(model)
    change(model)
    with walks.once():
        assert modules_of(model) is not before
        assert modules_of(model) == list(model.named_modules())
        assert list(parameters_of(model)) == [name for name, _ in model.named_parameters()]


@functools.partial(kept_of_model, reads_plain_values=True)
def _rates(model: Any) -> list[float]:
    return [vars(one)["rate"] for _, one in modules_of(model) if "rate" in vars(one)]


def test_where_plain_values_change_alone_what_rests_on_no_other_is_kept() -> None:
    model, walks = Shared(), ModelWalks()
    model.first[0].rate = 1000.5
    model.norm = torch.ones(1)
    with walks.once():
        modules, rates = modules_of(model), _rates(model)
    for number in range(100):  # what was there is freed, so what comes may have its identity
        model.first[0].rate = 1000.5 + number
        model.norm = torch.zeros(1)
        model.training = number % 2 == 0
        with walks.once():
            assert modules_of(model) is modules
            assert _rates(model) == [1000.5 + number]
    with walks.once():
        assert _rates(model) is not rates
        rates = _rates(model)
    with walks.once():
        assert _rates(model) is rates, "nothing has changed"
    model.first[0].rate = "fast"
    with walks.once():
        assert _rates(model) == ["fast"]


def test_question_is_asked_once_within_the_block() -> None:
    asked: list[str] = []

    @kept_within_look
    def ask(name: str) -> int:
        asked.append(name)
        return len(asked)

    walks = ModelWalks()
    with walks.once():
        assert [ask("a"), ask("a"), ask("b")] == [1, 1, 2]
    with walks.once():
        assert ask("a") == 3
    assert [ask("a"), ask("a")] == [4, 5]


def test_tensors_that_a_module_keeps_for_a_while_are_not_kept_longer() -> None:
    model, walks = Shared(), ModelWalks()
    model.register_buffer("cache", torch.ones(1))
    model.features = torch.ones(1)
    gone = [weakref.ref(model.cache), weakref.ref(model.features)]
    with walks.once():
        modules_of(model)
    model.cache = model.features = torch.zeros(1)
    assert [one() for one in gone] == [None, None]
