"""What is kept of a state from save to save is of use only as long as it is what the state holds."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_lifecycle.saving.files.archive import plain_copy
from hf_lifecycle.saving.snapshots.live import tensors_in
from hf_lifecycle.saving.snapshots.placement import LiveTensor, Placement
from hf_lifecycle.saving.snapshots.state_copies import StateCopies


def _trained(steps: int = 1) -> torch.optim.Optimizer:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 4)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for _ in range(steps):
        _step(optimizer)
    return optimizer


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for one in group["params"]:
            one.grad = torch.ones_like(one)
    optimizer.step()


def _row(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    row: dict[str, Any] = next(iter(optimizer.state.values()))
    return row


def _average(optimizer: torch.optim.Optimizer) -> torch.Tensor:
    average: torch.Tensor = _row(optimizer)["exp_avg"]
    return average


def _set(optimizer: torch.optim.Optimizer, **values: Any) -> None:
    _row(optimizer).update(values)


CHANGES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "nothing": lambda one: None,
    "a step": _step,
    "the learning rate": lambda one: one.param_groups[0].update(lr=0.2),
    "the learning rate, as a tensor of the state": lambda one: one.param_groups[0].update(lr=_row(one)["step"]),
    "an option that is new": lambda one: one.param_groups[0].update(new=[1, torch.ones(2)]),
    "another tensor": lambda one: _set(one, exp_avg=torch.ones(3, 4)),
    "another tensor in its own place": lambda one: setattr(_average(one), "data", torch.ones(3, 4)),
    "another shape of the same memory": lambda one: setattr(_average(one), "data", _average(one).data.view(4, 3)),
    "another type of the same memory": lambda one: setattr(_average(one), "data", _average(one).view(torch.int32)),
    "a gradient that is needed": lambda one: _average(one).requires_grad_(),
    "a number in the place of a tensor": lambda one: _set(one, step=3.0),
    "a list": lambda one: _set(one, more=[torch.zeros(2)]),
    "a name": lambda one: _set(one, other=_row(one).pop("exp_avg")),
    "a value less": lambda one: _row(one).pop("exp_avg"),
    "a parameter less": lambda one: one.state.pop(one.param_groups[0]["params"][0]),
    "an equal row": lambda one: one.state.update({one.param_groups[0]["params"][0]: dict(_row(one))}),
    "everything": lambda one: one.load_state_dict(_trained(3).state_dict()),
    "nothing left": lambda one: one.state.clear(),
}


def _bytes(tree: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(tree, stream)
    return stream.getvalue()


def _told(tensors: list[LiveTensor]) -> list[Any]:
    return [(one.name, one.tensor.untyped_storage()._cdata, one.at_once, one.is_alias) for one in tensors]


@pytest.mark.parametrize("change", CHANGES)
def test_copy_is_that_of_the_state_whatever_has_become_of_it(change: str) -> None:
    optimizer, copies = _trained(), StateCopies()
    for number in range(3):
        if number == 1:
            CHANGES[change](optimizer)
        copy, tensors = copies.of(optimizer.state_dict())
        expected = plain_copy(optimizer.state_dict())
        assert _bytes(copy) == _bytes(expected)
        assert _told(tensors) == _told(tensors_in(copy, "optimizer"))
        assert _told(tensors) == _told(tensors_in(expected, "optimizer"))
    optimizer.state.clear()
    optimizer.param_groups[0]["lr"] = 7.0
    assert _bytes(copy) == _bytes(expected)


def test_list_in_a_state_is_copied_each_time() -> None:
    history = [1.0]
    copies, tree = StateCopies(), {"state": {0: {"history": history, "sum": torch.ones(2)}}}
    first, _ = copies.of(tree)
    history.append(2.0)
    second, _ = copies.of(tree)
    assert (first["state"][0]["history"], second["state"][0]["history"]) == ([1.0], [1.0, 2.0])


@pytest.mark.parametrize("tree", [[1, 2], {"state": []}, {"state": {0: torch.ones(2)}}, {"state": {0: [1]}}, {}])
def test_state_of_another_form_is_copied_as_it_is(tree: Any) -> None:
    copies = StateCopies()
    for _ in range(2):
        copy, tensors = copies.of(tree)
        assert _bytes(copy) == _bytes(tree)
        assert _told(tensors) == _told(tensors_in(copy, "optimizer"))


def test_what_cannot_be_copied_is_refused_each_time_and_forgotten() -> None:
    optimizer, copies = _trained(), StateCopies()
    _set(optimizer, more=object())
    for _ in range(2):
        with pytest.raises(TypeError, match="object"):
            copies.of(optimizer.state_dict())
    del _row(optimizer)["more"]
    copy, _ = copies.of(optimizer.state_dict())
    assert _bytes(copy) == _bytes(optimizer.state_dict())


MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "nothing": lambda one: None,
    "written to": lambda one: one.zero_(),
    "other memory": lambda one: setattr(one, "data", torch.ones(3, 4)),
    "another shape": lambda one: setattr(one, "data", one.data.view(4, 3)),
    "another type": lambda one: setattr(one, "data", one.data.view(torch.int32)),
    "a part": lambda one: setattr(one, "data", one.data[1:]),
    "more memory": lambda one: one.untyped_storage().resize_(4096),
}


@pytest.mark.parametrize("move", MOVES)
def test_placement_is_of_tensors_that_lie_where_they_did(move: str) -> None:
    tensor, other = torch.zeros(3, 4), torch.zeros(5)
    live = [LiveTensor("a", tensor, False), LiveTensor("b", other, True)]
    placement = Placement(live)
    assert placement.is_of([LiveTensor("a", tensor, False), LiveTensor("b", other, True)])
    MOVES[move](tensor)
    assert placement.is_of(live) is (move in ("nothing", "written to", "more memory"))
    assert placement.sizes[0] == (4096 if move == "more memory" else 48)
    assert not placement.is_of(live[:1])
    assert not placement.is_of([LiveTensor("a", tensor, True), live[1]])
    assert not placement.is_of([LiveTensor("c", tensor, False), live[1]])
    assert not placement.is_of([LiveTensor("a", tensor.detach(), False), live[1]])


def test_tensor_that_is_known_to_be_written_is_copied_at_once_from_then_on() -> None:
    placement = Placement([LiveTensor("a", torch.zeros(3), False), LiveTensor("b", torch.zeros(4), False, True)])
    known: set[str] = set()
    assert placement.parted(known, overlap=False) == ([0, 1], [], ([], []))
    for names, at_once in ((known, []), ({"a"}, [0]), ({"a", "b"}, [0, 1])):
        parted = placement.parted(names, overlap=True)
        assert (parted.at_once, parted.later) == (at_once, [one for one in (0, 1) if one not in at_once])
        assert [one.name for each in parted.watched for one in each] == ["a", "b"][len(at_once) :]
