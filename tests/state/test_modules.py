"""The walk that a save is stopped for gives what torch's own gives, in the same order."""

from __future__ import annotations

import torch
from torch import nn

from hf_lifecycle.state.modules import modules_of, parameters_of, walked_once


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


def test_model_is_gone_through_once_within_the_block_and_anew_after_it() -> None:
    model, other = Shared(), Shared()
    with walked_once():
        modules, parameters = modules_of(model), parameters_of(model)
        assert modules_of(model) is modules
        assert parameters_of(model) is parameters
        assert modules_of(other) == list(other.named_modules())
        with walked_once():
            assert modules_of(model) is not modules
        assert modules_of(model) is modules
    model.more = nn.Linear(1, 1)
    assert modules_of(model) == list(model.named_modules())
    assert list(parameters_of(model)) == [name for name, _ in model.named_parameters()]
