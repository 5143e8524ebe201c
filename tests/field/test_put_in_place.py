"""What functions keep that a user has put in the place of a library's methods, or behind a property, goes on."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.trainer.runs import new_trainer, require_same_end

Make = Callable[[Path, pytest.MonkeyPatch], Trainer]
COMPUTE_LOSS, STEP, CLIP = Trainer.compute_loss, torch.optim.AdamW.step, Accelerator.clip_grad_norm_
LINEAR = nn.Linear.forward


def _shift(model: Any, calls: int) -> None:
    with torch.no_grad():
        for one in model.parameters():
            one.add_(1e-3 * calls)


def _behind_a_property(folder: Path, _: pytest.MonkeyPatch) -> Trainer:
    kept = {"calls": 0}

    class Counts(TrainerCallback):
        @property
        def calls(self) -> int:
            return kept["calls"]

        @calls.setter
        def calls(self, value: int) -> None:
            kept["calls"] = value

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.calls += 1
            _shift(model, self.calls)

    return new_trainer(folder, Counts(), LifecycleCallback())


def _on_a_plain_callback(folder: Path, _: pytest.MonkeyPatch) -> Trainer:
    calls, callback = [0], TrainerCallback()

    def on_step_begin(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        calls[0] += 1
        _shift(model, calls[0])

    callback.on_step_begin = on_step_begin  # type: ignore[method-assign]
    return new_trainer(folder, callback, LifecycleCallback())


def _in_trainers_class(folder: Path, patch: pytest.MonkeyPatch) -> Trainer:
    calls = [0]

    @functools.wraps(COMPUTE_LOSS)
    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return COMPUTE_LOSS(self, *args, **kwargs) * calls[0]

    patch.setattr(Trainer, "compute_loss", compute_loss)
    return new_trainer(folder, LifecycleCallback())


def _in_the_optimizers_class(folder: Path, patch: pytest.MonkeyPatch) -> Trainer:
    calls = [0]

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        for group in self.param_groups:
            group["weight_decay"] = 0.01 * calls[0]
        return STEP(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", step)  # which torch wraps
    return new_trainer(folder, LifecycleCallback())


def _in_accelerators_class(folder: Path, patch: pytest.MonkeyPatch) -> Trainer:
    calls = [0]

    def clip(self: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return CLIP(self, parameters, 0.01 * calls[0])

    patch.setattr(Accelerator, "clip_grad_norm_", clip)
    return new_trainer(folder, LifecycleCallback())


def _in_a_modules_class(folder: Path, patch: pytest.MonkeyPatch) -> Trainer:
    calls = [0]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls[0] += self.training
        return LINEAR(self, x) * (1 + 0.01 * calls[0])

    patch.setattr(nn.Linear, "forward", forward)
    return new_trainer(folder, LifecycleCallback())


def _on_the_accelerator(folder: Path, _: pytest.MonkeyPatch) -> Trainer:
    trainer, calls = new_trainer(folder, LifecycleCallback()), [0]
    plain = trainer.accelerator.backward

    def backward(loss: torch.Tensor, **kwargs: Any) -> None:
        calls[0] += 1
        plain(loss * calls[0], **kwargs)

    trainer.accelerator.backward = backward  # type: ignore[method-assign]
    return trainer


class Scales(Trainer):
    """Has a scaler of its own, whose scale is one at which rounding differs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=1.1, growth_interval=2)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        scale = self.scaler.scale(torch.ones(()))
        self.scaler.update(float(scale) * 1.1)
        return super().compute_loss(*args, **kwargs) * scale


def _scaler(folder: Path, _: pytest.MonkeyPatch) -> Trainer:
    return new_trainer(folder, LifecycleCallback(), kind=Scales)


MAKE: dict[str, Make] = {
    "behind a property": _behind_a_property,
    "on a plain callback": _on_a_plain_callback,
    "in Trainer's class": _in_trainers_class,
    "in the optimizer's class": _in_the_optimizers_class,
    "in Accelerator's class": _in_accelerators_class,
    "in a module's class": _in_a_modules_class,
    "on the accelerator": _on_the_accelerator,
    "a scaler": _scaler,
}


@pytest.mark.parametrize("name", MAKE)
def test_what_it_keeps_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        require_same_end(lambda folder: MAKE[name](tmp_path / folder, monkeypatch))
    assert not caplog.records
