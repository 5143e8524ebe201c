"""What a user's code keeps where no ``state_dict`` has it is what it was after a resume.

A parameter that no optimizer holds, an attribute on Trainer's state, on an optimizer, a scheduler or a parameter, an
optimizer's defaults, the count of a schedule that says nothing of its state.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from tests.trainer.runs import new_trainer, require_same_end


class Keeps(TrainerCallback):
    """Counts somewhere, and trains by the count."""

    def __init__(self, count: Callable[..., Any]) -> None:
        self._count = count

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for one in model.parameters():
                one.add_(1e-3 * float(self._count(state=state, parameter=one, model=model, **kwargs)))


def _counted_on(owner: Callable[..., Any], name: str = "seen") -> Callable[..., Any]:
    def count(**kwargs: Any) -> Any:
        one = owner(**kwargs)
        setattr(one, name, getattr(one, name, 0) + 1)
        return getattr(one, name)

    return count


class Held(TrainerCallback):
    """Parameters that no optimizer holds, in an attribute, in containers, written to in each way."""

    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.zeros(()))
        self.named = {"shift": nn.Parameter(torch.zeros(2), requires_grad=False)}
        self.listed = [nn.Parameter(torch.zeros(())), "of a pair"]
        self.anew = nn.Parameter(torch.zeros(()))

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            self.scale.add_(1e-3)
            self.listed[0].mul_(2).add_(1e-3)  # type: ignore[union-attr]
        self.named["shift"].data = self.named["shift"] + 1e-3
        self.anew = nn.Parameter(self.anew.detach() + 1e-3)
        with torch.no_grad():
            for one in model.parameters():
                one.add_(self.scale + self.named["shift"].sum() + self.listed[0] + self.anew)


class Averages(TrainerCallback):
    """A moving average that is kept on each parameter."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            for one in model.parameters():
                if not hasattr(one, "average"):
                    one.average = torch.zeros_like(one)
                one.average.lerp_(one, 0.1)
                one.add_(0.01 * one.average)


class Defaults(TrainerCallback):
    """Decays by what the optimizer was made with."""

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        inner = optimizer.optimizer
        inner.defaults["lr"] *= 0.9
        for group in inner.param_groups:
            group["weight_decay"] = inner.defaults["lr"]


class Counting:
    """A schedule of one's own that keeps its count to itself."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer
        self.steps = 0

    def step(self, *_: Any) -> None:
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + self.steps)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _counts_in_a_function(optimizer: Any) -> Any:
    calls = [0]

    def factor(_: int) -> float:
        calls[0] += 1
        return 1 / (1 + calls[0])

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _counts_in_a_method(optimizer: Any) -> Any:
    calls = [0]

    class Counted(torch.optim.lr_scheduler.LRScheduler):
        def __init__(self) -> None:
            self.optimizer, self._last_lr = optimizer, [1e-2]

        def step(self, *_: Any) -> None:
            calls[0] += 1
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + calls[0])
            self._last_lr = [group["lr"] for group in optimizer.param_groups]

        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    return Counted()


def _scheduled_by(make: Callable[[Any], Any]) -> type[Trainer]:
    class Scheduled(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = make(optimizer or self.optimizer)
            return self.lr_scheduler

    return Scheduled


KEPT: dict[str, Callable[[], TrainerCallback]] = {
    "parameters without an optimizer": Held,
    "on the state": lambda: Keeps(_counted_on(lambda state, **_: state)),
    "on the prepared optimizer": lambda: Keeps(_counted_on(lambda optimizer, **_: optimizer)),
    "on the optimizer": lambda: Keeps(_counted_on(lambda optimizer, **_: optimizer.optimizer)),
    "on the scheduler": lambda: Keeps(_counted_on(lambda lr_scheduler, **_: lr_scheduler)),
    "on each parameter": lambda: Keeps(_counted_on(lambda parameter, **_: parameter)),
    "tensors on parameters": Averages,
    "defaults of the optimizer": Defaults,
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_kept_there_goes_on(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        require_same_end(lambda folder: new_trainer(tmp_path / folder, KEPT[name](), LifecycleCallback()))
    assert not caplog.records


@pytest.mark.parametrize("make", [Counting, _counts_in_a_function, _counts_in_a_method])
def test_schedule_that_keeps_its_count_to_itself_goes_on(make: Callable[[Any], Any], tmp_path: Path) -> None:
    kind = _scheduled_by(make)
    require_same_end(lambda folder: new_trainer(tmp_path / folder, LifecycleCallback(), kind=kind))


def test_parameters_of_the_model_are_saved_by_trainer_alone(tmp_path: Path) -> None:
    class Lists(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.every = list(model.parameters())
            self.groups = [{"params": list(model.parameters()), "lr": 1.0}]

    new_trainer(tmp_path, Lists(), LifecycleCallback(), max_steps=2).train()
    parts = read_tree(rank_file(tmp_path / "checkpoint-2", 0), kind=TRAINER)["parts"]
    assert parts["attributes"]["values"] == {}
