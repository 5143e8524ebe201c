"""What a callback changes in ``on_save``, when the checkpoint is complete, is named at the first save that shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.field.limits import Limit
from tests.trainer.runs import Net, new_trainer

CHANGED_AFTER_SAVE = Limit(
    what="A callback's `on_save`, or code after `super()._save_checkpoint()` or `super()._maybe_log_save_evaluate()`, "
    "changes what the save has: its own counter, a setting of the optimizer or the schedule, a buffer",
    when="at a save",
    line=("not exact: … changed … after the save at step …, so the checkpoint has the old values. Change them …"),
)


class Scaled(Net):
    """A net with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))


class InOnSave(TrainerCallback):
    """Changes one thing there."""

    def __init__(self, change: Callable[..., object]) -> None:
        self.saves = 0
        self._change = change

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._change(self=self, state=state, **kwargs)


class AfterSuper(Trainer):
    """Counts its saves when they are made."""

    saves = 0

    def _save_checkpoint(self, *given: Any, **named: Any) -> Any:
        super()._save_checkpoint(*given, **named)
        self.saves += 1


class AfterStep(Trainer):
    """Counts its steps when one has ended."""

    steps = 0

    def _maybe_log_save_evaluate(self, *given: Any, **named: Any) -> None:
        super()._maybe_log_save_evaluate(*given, **named)
        self.steps += 1


def _decayed(optimizer: Any, **_: Any) -> None:
    for group in optimizer.param_groups:
        group["weight_decay"] += 0.1


def _without_momentum(optimizer: Any, **_: Any) -> None:
    for one in optimizer.state.values():
        one["exp_avg"].zero_()


CHANGES: dict[str, tuple[Callable[..., object], str]] = {
    "a counter": (lambda self, **_: setattr(self, "saves", self.saves + 1), "InOnSave.saves"),
    "a value on the state": (lambda state, **_: setattr(state, "saves", 1), "state.saves"),
    "weight decay": (_decayed, "optimizer.param_groups[0].weight_decay"),
    "momentum": (_without_momentum, "exp_avg in the state of the optimizer"),
    "rates of the schedule": (
        lambda lr_scheduler, **_: setattr(lr_scheduler, "base_lrs", [0.0, 0.0]),
        "lr_scheduler.base_lrs",
    ),
    "a buffer": (lambda model, **_: model.scale.mul_(2), "buffer scale"),
    "a dropout": (lambda model, **_: setattr(model.layers[1], "p", 0.0), "model.layers.1.p"),
    "a layer that is frozen": (
        lambda model, **_: model.layers[0].requires_grad_(False),
        "requires_grad of layers.0.bias",
    ),
}


def _warnings(trainer: Trainer, caplog: pytest.LogCaptureFixture) -> list[str]:
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        trainer.train()
    return [one.getMessage() for one in caplog.records if "not exact" in one.getMessage()]


@pytest.mark.parametrize("name", CHANGES)
def test_change_in_on_save_is_named_once(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, path = CHANGES[name]
    trainer = new_trainer(tmp_path, InOnSave(change), LifecycleCallback(), model=Scaled())
    (told,) = _warnings(trainer, caplog)
    CHANGED_AFTER_SAVE.require_told(told)
    assert f"InOnSave.on_save changed {path}" in told


@pytest.mark.parametrize(("kind", "path"), [(AfterSuper, "trainer.saves"), (AfterStep, "trainer.steps")])
def test_change_after_the_save_of_a_subclass_is_named(
    kind: Any, path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(), kind=kind)
    (told,) = _warnings(trainer, caplog)
    CHANGED_AFTER_SAVE.require_told(told)
    name = "_save_checkpoint" if kind is AfterSuper else "_maybe_log_save_evaluate"
    assert f"{kind.__name__}.{name} changed {path} after the save at step 2" in told
    assert told.endswith(f"Change them before super().{name}()")
    assert not {"_save_checkpoint", "_maybe_log_save_evaluate"} & vars(trainer).keys()


def test_both_are_named_where_both_may_have_changed_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    callbacks = InOnSave(lambda **_: None), LifecycleCallback()
    (told,) = _warnings(new_trainer(tmp_path, *callbacks, kind=AfterSuper), caplog)
    assert "InOnSave.on_save or AfterSuper._save_checkpoint changed trainer.saves" in told
    assert told.endswith("Change them in on_step_end or on_step_begin, or before super()._save_checkpoint()")


def test_callback_that_only_reads_in_on_save_is_told_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def reads(state: Any, model: Any, **_: Any) -> None:
        torch.rand(2)
        assert (tmp_path / f"checkpoint-{state.global_step}").is_dir()
        model.state_dict()

    assert not _warnings(new_trainer(tmp_path, InOnSave(reads), LifecycleCallback(), model=Scaled()), caplog)


def test_generator_that_does_not_draw_in_on_save_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    held = []  # so that what is made next lies elsewhere in memory

    class Draws(InOnSave):
        def __init__(self) -> None:
            super().__init__(lambda **_: held.append(self.own.get_state()))
            self.own = torch.Generator().manual_seed(1)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.rand(1, generator=self.own)

    new_trainer(tmp_path, LifecycleCallback(), Draws(), max_steps=4, save_steps=2).train()
    assert "Draws.on_save changed Draws._change.held after the save" in caplog.text
