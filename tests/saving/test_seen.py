"""Tensors count as those of an earlier look only where they are the same objects, of the same kind, where they were."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from hf_lifecycle.saving.sharded.seen import Seen
from hf_lifecycle.saving.sharded.values import Parts, SavedNames, Training

Named = list[dict[str, torch.Tensor]]


def tensors() -> Named:
    return [{"weight": torch.nn.Parameter(torch.ones(2, 3))}, {"step": torch.tensor(1.0), "mean": torch.ones(2, 3)}]


CHANGES: dict[str, Callable[[Named], object]] = {
    "another tensor": lambda named: named[1].update(mean=named[1]["mean"].clone()),
    "a view of it": lambda named: named[1].update(mean=named[1]["mean"].view(2, 3)),
    "another memory": lambda named: setattr(named[0]["weight"], "data", torch.ones(2, 3)),
    "another shape": lambda named: named[1]["mean"].resize_(3, 2),
    "another order": lambda named: named[1]["mean"].t_(),
    "another type": lambda named: setattr(named[1]["mean"], "data", named[1]["mean"].view(torch.int32)),
    "no gradient": lambda named: named[0]["weight"].requires_grad_(False),
    "one more": lambda named: named[1].update(other=torch.ones(1)),
    "one less": lambda named: named[1].pop("step"),
    "other names": lambda named: named[1].update(first=named[1].pop("step"), second=named[1].pop("mean")),
    "in another row": lambda named: named[0].update(step=named[1].pop("step")),
    "rows swapped": lambda named: named.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_other_tensor_name_place_or_kind_is_seen(change: str) -> None:
    named = tensors()
    before = Seen(named).kept()
    with torch.no_grad():
        for one in (one for row in named for one in row.values()):
            one.add_(1)  # other elements are not another tensor
        assert Seen(named).is_as(before)
        CHANGES[change](named)
    assert not Seen(named).is_as(before)


def test_what_there_is_at_a_save_is_as_it_is_found_anew() -> None:
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    parts, names = Parts(), SavedNames({"weight": "weight", "bias": "bias"}, ("weight", "bias"))
    training = Training(model, optimizer, "model", "optimizer")

    def look(parts: Parts) -> list[object]:
        with parts.renewed():
            one = names.present(training, parts)
        kinds = {name: parts.kind_of(value) for held in one.folders.values() for name, value in held.items()}
        live = [(each.name, id(each.tensor), each.at_once) for each in one.tensors]
        values = {name: {key: id(value) for key, value in held.items()} for name, held in one.folders.items()}
        groups = [value for key, value in one.folders["optimizer"].items() if "param_groups" in key]
        return [live, kinds, values["model"], sorted(values["optimizer"]), groups, one.optimizer, one.settings]

    def same(first: list[object], second: list[object]) -> bool:
        return repr(first) == repr(second)

    assert same(look(parts), look(Parts()))
    for change in (
        lambda: None,
        lambda: [model(torch.ones(1, 3)).sum().backward(), optimizer.step()],
        lambda: optimizer.step(),
        lambda: optimizer.param_groups[0].update(lr=0.3),
        lambda: optimizer.param_groups[0].update(lr=torch.tensor(0.3)),
        lambda: optimizer.state[model.bias].update(count=3),
        lambda: optimizer.state[model.bias].update(count=4),
        lambda: optimizer.state[model.bias].pop("count"),
        lambda: model.bias.requires_grad_(False),
        lambda: optimizer.state[model.weight].update(exp_avg=torch.ones(2, 3)),
        lambda: optimizer.state[model.weight]["exp_avg"].resize_(3, 2),
        lambda: optimizer.state.pop(model.weight),
        lambda: optimizer.state.clear(),
    ):
        change()
        assert same(look(parts), look(Parts()))


def test_what_was_made_of_the_same_tensors_is_not_made_again() -> None:
    parts, made = Parts(), []
    tensor = torch.ones(2)

    def make() -> torch.Tensor:
        made.append(parts.of(tensor))
        return made[-1]

    for of in (1, 1, 2, 2):
        with parts.renewed():
            assert parts.kept("model", [{"a": tensor}], of, make) is tensor
            assert parts.kind_of(tensor)[0] == tensor.shape
    assert len(made) == 2
