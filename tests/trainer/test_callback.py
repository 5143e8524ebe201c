"""LifecycleCallback as a user meets it: its arguments, and its behaviour as one object."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_lifecycle import EarlyStopping, KeepLast, LifecycleCallback
from hf_lifecycle.errors import UnsupportedTraining

from .runs import Net, Stream, break_off, digests, new_trainer, saved_run


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"patience": -1}, "patience"),
        ({"patience": 1.5}, "patience"),
        ({"patience": "3"}, "patience"),
        ({"patience": 3, "min_delta": -0.1}, "min_delta"),
        ({"patience": 3, "min_delta": float("nan")}, "min_delta"),
        ({"patience": 3, "mode": "maximum"}, "mode"),
        ({"patience": 3, "monitor": 7}, "monitor"),
        ({"min_delta": 0.1}, "min_delta"),
        ({"mode": "max"}, "mode"),
        ({"monitor": "loss"}, "monitor"),
        ({"early_stopping": EarlyStopping(), "patience": 3}, "early_stopping"),
        ({"early_stopping": EarlyStopping(), "mode": "min"}, "early_stopping"),
        ({"early_stopping": EarlyStopping(), "min_delta": 0.5}, "early_stopping"),
        ({"early_stopping": 5}, "early_stopping"),
        ({"objects": {"ema": object()}}, "objects"),
        ({"objects": [Net()]}, "objects"),
        ({"objects": {3: Net()}}, "objects"),
        ({"resume_from": True}, "resume_from"),
        ({"strict": "yes"}, "strict"),
    ],
)
def test_a_wrong_argument_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises((ValueError, TypeError), match=named):
        LifecycleCallback(**settings)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="patients"):
        LifecycleCallback(patients=3)


def test_an_object_is_named_with_what_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"objects\['ema'\]: a int has no state_dict"):
        LifecycleCallback(objects={"net": Net(), "ema": 3})


def test_a_resumed_run_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    whole = new_trainer(tmp_path / "whole", LifecycleCallback())
    whole.train()
    saved_run(tmp_path / "broken")
    resumed = new_trainer(tmp_path / "broken", LifecycleCallback())
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)


def test_one_object_in_two_trainings_starts_afresh(tmp_path: Path) -> None:
    callback = LifecycleCallback(patience=1, min_delta=1e9)
    lengths = []
    for name in ("first", "second"):
        trainer = new_trainer(tmp_path / name, callback, eval_strategy="steps", eval_steps=1)
        trainer.train()
        lengths.append((trainer.state.global_step, digests(trainer)))
        assert callback.early_stopping is not None
        assert callback.early_stopping.counter == 1
    assert lengths[0][0] == 2
    assert lengths[0] == lengths[1]


def test_one_early_stopping_object_in_two_trainings_starts_afresh(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=1, min_delta=1e9)
    callback = LifecycleCallback(early_stopping=stopping)
    for name in ("first", "second"):
        trainer = new_trainer(tmp_path / name, callback, eval_strategy="steps", eval_steps=1)
        trainer.train()
        assert trainer.state.global_step == 2
        assert stopping.counter == 1


def test_an_object_that_had_stepped_before_goes_on_from_there(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=2, min_delta=1e9)
    stopping.step(1.0, progress=0)
    callback = LifecycleCallback(early_stopping=stopping)
    for name in ("first", "second"):
        trainer = new_trainer(tmp_path / name, callback, eval_strategy="steps", eval_steps=1)
        trainer.train()
        assert trainer.state.global_step == 2


def test_arguments_are_as_given_after_training(tmp_path: Path) -> None:
    best = EarlyStopping(patience=None, restore_best=True)
    broken = new_trainer(
        tmp_path, LifecycleCallback(early_stopping=best), eval_strategy="steps", eval_steps=2, eval_on_start=True
    )
    break_off(broken)
    resumed = new_trainer(
        tmp_path, LifecycleCallback(early_stopping=best), eval_strategy="steps", eval_steps=2, eval_on_start=True
    )
    before = resumed.args.to_dict()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.to_dict() == before


def test_arguments_are_as_given_after_a_resumed_stream(tmp_path: Path) -> None:
    saved_run(tmp_path, train=Stream())
    resumed = new_trainer(tmp_path, LifecycleCallback(), train=Stream())
    before = resumed.args.to_dict()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.args.to_dict() == before


def test_arguments_are_as_given_after_a_refused_resume(tmp_path: Path) -> None:
    saved_run(tmp_path, train=Stream())
    best = EarlyStopping(patience=None, restore_best=True)
    resumed = new_trainer(
        tmp_path,
        LifecycleCallback(early_stopping=best, strict=False),
        train=Stream(),
        eval_on_start=True,
        eval_strategy="no",
    )
    before = resumed.args.to_dict()
    with pytest.raises(UnsupportedTraining, match="eval_strategy"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.args.to_dict() == before


def test_arguments_are_as_given_again_when_training_follows_one_that_was_broken_off(tmp_path: Path) -> None:
    callback = LifecycleCallback(early_stopping=EarlyStopping(patience=None, restore_best=True))
    trainer = new_trainer(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    before = trainer.args.to_dict()
    break_off(trainer)
    trainer.train()
    assert trainer.args.to_dict() == before


def test_an_evaluation_after_training_decides_nothing(tmp_path: Path) -> None:
    callback = LifecycleCallback(patience=3)
    trainer = new_trainer(tmp_path, callback, eval_strategy="steps", eval_steps=2)
    trainer.train()
    assert callback.early_stopping is not None
    seen = callback.early_stopping.evaluations
    trainer.evaluate()
    assert callback.early_stopping.evaluations == seen


def test_trainer_may_rebuild_its_callbacks_from_the_checkpoint(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    callback = LifecycleCallback()
    break_off(new_trainer(tmp_path, EarlyStoppingCallback(9), callback, **settings))
    again = LifecycleCallback()
    resumed = new_trainer(
        tmp_path, EarlyStoppingCallback(9), again, restore_callback_states_from_checkpoint=True, **settings
    )
    resumed.train(resume_from_checkpoint=True)
    assert again in resumed.callback_handler.callbacks
    assert resumed.state.global_step == 6


def test_an_old_checkpoint_without_us_may_be_resumed_with_restored_callbacks(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path))
    resumed = new_trainer(tmp_path, LifecycleCallback(), restore_callback_states_from_checkpoint=True)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


class Counts(Net):
    """With a plain value that training changes."""

    calls = 0

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.calls += 1
        return super().forward(x, labels)


def test_a_run_logs_one_line_a_save_and_one_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def trainer() -> Any:
        callback = LifecycleCallback(patience=9, keep=KeepLast(1))
        return new_trainer(tmp_path, callback, model=Counts(), eval_strategy="steps", eval_steps=2)

    def lines() -> list[str]:
        said = [(record.levelno, record.getMessage()) for record in caplog.records]
        caplog.clear()
        assert {level for level, _ in said} == {logging.INFO}
        return [line.split(": ")[1] if "saved" in line else line.split(" from ")[0] for _, line in said]

    caplog.set_level(logging.INFO, logger="hf_lifecycle")
    break_off(trainer(), step=5)
    assert lines() == ["saved step 2", "saved step 4"]
    trainer().train(resume_from_checkpoint=True)
    assert lines() == ["resumed", "saved step 6"]


def test_every_event_that_a_part_hears_is_forwarded(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, callback := LifecycleCallback())
    trainer.train()
    stock = {name for name in vars(TrainerCallback) if name.startswith("on_")}
    heard = {name for part in callback._parts for name in stock if name in vars(type(part))}
    assert heard <= {name for name in stock if name in vars(LifecycleCallback)}


def test_training_moves_nothing_of_torch_that_lasts(tmp_path: Path) -> None:
    before = (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype())
    new_trainer(tmp_path, LifecycleCallback()).train()
    assert (torch.is_grad_enabled(), torch.get_num_threads(), torch.get_default_dtype()) == before
