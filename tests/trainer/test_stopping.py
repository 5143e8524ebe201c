"""Early stopping under Trainer: the metric watched, the moment of stopping, and the best weights put back."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from hf_lifecycle import EarlyStopping, LifecycleCallback
from hf_lifecycle.errors import MetricNotFound, UnsupportedTraining
from hf_lifecycle.hosts.trainer.stopping import default_mode, default_monitor
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest

from .runs import Rows, break_off, digests, new_trainer

EVERY_STEP: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}


class Scripted:
    """A ``compute_metrics`` that gives these values, one an evaluation."""

    def __init__(self, *values: float, name: str = "score") -> None:
        self.values, self.name, self.asked = values, name, 0

    def __call__(self, prediction: Any) -> dict[str, float]:
        self.asked += 1
        return {self.name: self.values[self.asked - 1]}


class WeightsByStep(TrainerCallback):
    """Remembers the digests of the model at each evaluation."""

    def __init__(self) -> None:
        self.at: dict[int, dict[str, str]] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.at[state.global_step] = of(model)


def of(model: torch.nn.Module) -> dict[str, str]:
    return {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}


def settled(tmp_path: Path, **settings: Any) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **settings)


@pytest.mark.parametrize(
    ("settings", "monitor"),
    [
        ({}, "eval_loss"),
        ({"metric_for_best_model": "accuracy"}, "eval_accuracy"),
        ({"metric_for_best_model": "eval_accuracy"}, "eval_accuracy"),
    ],
)
def test_the_default_monitor_is_that_of_the_best_model(tmp_path: Path, settings: Any, monitor: str) -> None:
    assert default_monitor(settled(tmp_path, **settings)) == monitor


@pytest.mark.parametrize(
    ("settings", "monitor", "mode"),
    [
        ({}, "eval_loss", "min"),
        ({}, "eval_accuracy", "max"),
        ({}, "loss", "min"),
        ({}, "eval_b_loss", "min"),
        ({"metric_for_best_model": "error", "greater_is_better": False}, "eval_error", "min"),
        ({"metric_for_best_model": "error", "greater_is_better": False}, "error", "min"),
        ({"metric_for_best_model": "eval_error", "greater_is_better": False}, "error", "min"),
        ({"metric_for_best_model": "error", "greater_is_better": False}, "accuracy", "max"),
        ({"metric_for_best_model": "accuracy"}, "loss", "min"),
        ({"metric_for_best_model": "neg_loss", "greater_is_better": True}, "neg_loss", "max"),
    ],
)
def test_the_default_mode_is_that_of_the_metric(tmp_path: Path, settings: Any, monitor: str, mode: str) -> None:
    assert default_mode(settled(tmp_path, **settings), monitor) == mode


@pytest.mark.parametrize("monitor", ["score", "eval_score"])
@pytest.mark.parametrize(("mode", "stops_at"), [("max", 5), ("min", 3)])
def test_training_stops_when_patience_has_passed(tmp_path: Path, monitor: str, mode: Any, stops_at: int) -> None:
    callback = LifecycleCallback(patience=2, monitor=monitor, mode=mode)
    metrics = Scripted(1.0, 2.0, 3.0, 2.9, 2.8, 2.7)
    trainer = new_trainer(tmp_path, callback, with_trainer={"compute_metrics": metrics}, **EVERY_STEP)
    trainer.train()
    assert trainer.state.global_step == stops_at
    assert callback.early_stopping is not None
    assert callback.early_stopping.best_metric == (3.0 if mode == "max" else 1.0)


def test_the_line_in_the_log_says_why(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(patience=1, min_delta=1e9), **EVERY_STEP).train()
    assert "early stopping at step 2: no improvement on the best" in caplog.text


def test_a_metric_of_zero_is_a_metric(tmp_path: Path) -> None:
    callback = LifecycleCallback(patience=2, monitor="score", mode="min")
    metrics = Scripted(1.0, 0.0, 0.5, 0.5, 0.5)
    trainer = new_trainer(tmp_path, callback, with_trainer={"compute_metrics": metrics}, **EVERY_STEP)
    trainer.train()
    assert trainer.state.global_step == 4


def test_a_metric_that_never_appears_is_an_error_when_patience_has_passed(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(patience=1, monitor="accuracy"), **EVERY_STEP)
    with pytest.raises(MetricNotFound, match="accuracy") as raised:
        trainer.train()
    assert trainer.state.global_step == 1
    assert "eval_loss" in raised.value.available
    assert raised.value.monitor == "accuracy"


def test_a_metric_that_never_appears_is_an_error_where_the_first_evaluation_is_the_last_event(tmp_path: Path) -> None:
    callback = LifecycleCallback(patience=1, monitor="accuracy")
    trainer = new_trainer(tmp_path, callback, eval_strategy="epoch", num_train_epochs=1, max_steps=-1, save_steps=0.9)
    with pytest.raises(MetricNotFound, match="accuracy"):
        trainer.train()


SETS = {"a": Rows(4, seed=3), "b": Rows(4, seed=4), "c": Rows(4, seed=5)}


@pytest.mark.parametrize("monitor", ["eval_a_loss", "b_loss", "eval_c_loss"])
def test_one_of_several_evaluation_sets_may_have_the_metric(tmp_path: Path, monitor: str) -> None:
    callback = LifecycleCallback(patience=2, min_delta=1e9, monitor=monitor)
    trainer = new_trainer(tmp_path, callback, evaluated=SETS, **EVERY_STEP)
    trainer.train()
    assert trainer.state.global_step == 3
    assert callback.early_stopping is not None
    assert callback.early_stopping.evaluations == 3


def test_a_metric_that_no_evaluation_set_has_is_an_error_that_lists_those_of_all(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(patience=2), evaluated=SETS, **EVERY_STEP)
    with pytest.raises(MetricNotFound) as raised:
        trainer.train()
    assert trainer.state.global_step == 2
    assert {"eval_a_loss", "eval_b_loss", "eval_c_loss"} <= set(raised.value.available)


def test_evaluation_with_another_prefix_is_somebody_elses(tmp_path: Path) -> None:
    class Watches(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.evaluate(trainer.train_dataset, metric_key_prefix="train")

    ours = LifecycleCallback(patience=50)
    trainer = new_trainer(tmp_path, Watches(), ours, evaluated=Rows(8), eval_strategy="epoch")
    trainer.train()
    assert ours.early_stopping is not None
    assert ours.early_stopping.best_metric in [
        row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row
    ]


def test_patience_needs_evaluations(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedTraining, match="eval_strategy"):
        new_trainer(tmp_path, LifecycleCallback(patience=2), eval_strategy="no").train()


@pytest.mark.parametrize("stops_at", [2, None])
def test_training_that_ends_without_an_evaluation_is_told_of_unless_it_was_interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stops_at: int | None
) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop |= state.global_step == stops_at

    new_trainer(tmp_path, LifecycleCallback(patience=2), Stops(), eval_strategy="epoch", eval_delay=100).train()
    assert ("early stopping had no effect" in caplog.text) == (stops_at is None)


def test_restoring_the_best_needs_checkpoints(tmp_path: Path) -> None:
    callback = LifecycleCallback(early_stopping=EarlyStopping(restore_best=True))
    with pytest.raises(UnsupportedTraining, match="save_strategy"):
        new_trainer(tmp_path, callback, save_strategy="no", **EVERY_STEP).train()


@pytest.mark.parametrize(("unit", "patience", "stops_at"), [("steps", 2, 3), ("samples", 8, 3), ("samples", 12, 4)])
def test_patience_is_counted_in_its_unit(tmp_path: Path, unit: Any, patience: int, stops_at: int) -> None:
    stopping = EarlyStopping(patience=patience, min_delta=1e9, patience_unit=unit)
    trainer = new_trainer(tmp_path, LifecycleCallback(early_stopping=stopping), **EVERY_STEP)
    trainer.train()
    assert trainer.state.global_step == stops_at


def test_samples_count_what_accumulation_sees(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=16, min_delta=1e9, patience_unit="samples")
    trainer = new_trainer(
        tmp_path, LifecycleCallback(early_stopping=stopping), gradient_accumulation_steps=2, **EVERY_STEP
    )
    trainer.train()
    assert trainer.state.global_step == 3


def test_patience_in_seconds_goes_on_over_a_break(tmp_path: Path) -> None:
    def callback() -> LifecycleCallback:
        return LifecycleCallback(early_stopping=EarlyStopping(patience=1e5, min_delta=1e9, patience_unit="seconds"))

    break_off(new_trainer(tmp_path, callback(), **EVERY_STEP))
    resumed = callback()
    new_trainer(tmp_path, resumed, **EVERY_STEP).train(resume_from_checkpoint=True)
    assert resumed.early_stopping is not None
    assert resumed.early_stopping.evaluations == 6


@pytest.mark.parametrize("unit", ["evaluations", "steps", "samples"])
def test_the_counter_goes_on_over_a_break(tmp_path: Path, unit: Any) -> None:
    def callback() -> LifecycleCallback:
        patience = {"evaluations": 4, "steps": 4, "samples": 16}[unit]
        return LifecycleCallback(early_stopping=EarlyStopping(patience=patience, min_delta=1e9, patience_unit=unit))

    break_off(new_trainer(tmp_path, callback(), **EVERY_STEP))
    resumed = new_trainer(tmp_path, callback(), **EVERY_STEP)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5


def test_a_run_that_stopped_does_not_train_on_when_resumed(tmp_path: Path) -> None:
    stopped = new_trainer(tmp_path, LifecycleCallback(patience=1, min_delta=1e9), save_steps=1, **EVERY_STEP)
    stopped.train()
    again = new_trainer(tmp_path, LifecycleCallback(patience=1, min_delta=1e9), save_steps=1, **EVERY_STEP)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == stopped.state.global_step == 2
    assert of(again.model) == of(stopped.model)


# Best at step 3, which is neither the last nor one at which a save was due.
SCORES = (1.0, 2.0, 5.0, 4.0, 3.0, 2.0)


def scripted(tmp_path: Path, *callbacks: TrainerCallback, **settings: Any) -> Any:
    metrics = Scripted(*SCORES)
    return new_trainer(tmp_path, *callbacks, with_trainer={"compute_metrics": metrics}, **{**EVERY_STEP, **settings})


def best_of(**settings: Any) -> LifecycleCallback:
    stopping = EarlyStopping(patience=settings.pop("patience", None), mode="max", restore_best=True, **settings)
    return LifecycleCallback(early_stopping=stopping, monitor="score")


@pytest.mark.parametrize("patience", [None, 2])
def test_the_weights_of_the_best_evaluation_are_put_back(tmp_path: Path, patience: int | None) -> None:
    seen = WeightsByStep()
    trainer = scripted(tmp_path, seen, best_of(patience=patience))
    trainer.train()
    assert of(trainer.model) == seen.at[3]
    assert of(trainer.model) != seen.at[4]
    assert trainer.state.best_global_step == 3
    assert trainer.state.best_metric == 5.0
    assert trainer.args.load_best_model_at_end is False


def test_the_best_is_put_back_after_a_break_behind_it(tmp_path: Path) -> None:
    seen = WeightsByStep()
    break_off(scripted(tmp_path, seen, best_of()), step=4)
    resumed = scripted(tmp_path, best_of())  # the metric goes on at the fifth score
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert of(resumed.model) == seen.at[3]


def test_the_best_outlives_the_limit_of_saves(tmp_path: Path) -> None:
    seen = WeightsByStep()
    trainer = scripted(tmp_path, seen, best_of(), save_steps=1, save_total_limit=1)
    trainer.train()
    assert of(trainer.model) == seen.at[3]


def test_the_best_is_put_back_with_evaluations_by_epoch(tmp_path: Path) -> None:
    seen = WeightsByStep()
    callback = best_of()
    trainer = new_trainer(
        tmp_path,
        seen,
        callback,
        with_trainer={"compute_metrics": Scripted(5.0, 1.0, 2.0)},
        eval_strategy="epoch",
        save_strategy="epoch",
        max_steps=-1,
        num_train_epochs=3,
    )
    trainer.train()
    assert trainer.state.global_step == 12
    assert of(trainer.model) == seen.at[4]


def test_the_best_that_is_the_last_stays(tmp_path: Path) -> None:
    seen = WeightsByStep()
    trainer = new_trainer(
        tmp_path, seen, best_of(), with_trainer={"compute_metrics": Scripted(1, 2, 3, 4, 5, 6)}, **EVERY_STEP
    )
    trainer.train()
    assert of(trainer.model) == seen.at[6]


def test_the_best_of_trainers_own_metric_is_put_back(tmp_path: Path) -> None:
    seen = WeightsByStep()
    trainer = scripted(tmp_path, seen, best_of(), metric_for_best_model="score")
    trainer.train()
    assert of(trainer.model) == seen.at[3]


@pytest.mark.parametrize(
    "settings", [{"metric_for_best_model": "loss"}, {"metric_for_best_model": "score", "greater_is_better": False}]
)
def test_a_best_that_trainer_would_choose_otherwise_is_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedTraining, match="metric_for_best_model"):
        scripted(tmp_path, best_of(), **settings).train()


def test_it_works_with_load_best_model_at_end(tmp_path: Path) -> None:
    seen = WeightsByStep()
    callback = LifecycleCallback(patience=2)
    trainer = scripted(
        tmp_path, seen, callback, load_best_model_at_end=True, metric_for_best_model="score", save_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 5
    assert of(trainer.model) == seen.at[3]
    assert trainer.args.load_best_model_at_end is True


def test_the_best_weights_are_repaired_where_trainer_loses_them(tmp_path: Path) -> None:
    """ViT: what ``save_pretrained`` renames, ``load_best_model_at_end`` does not find."""
    from .runs import images, tiny_vit

    seen = WeightsByStep()
    trainer = scripted(tmp_path, seen, best_of(), model=tiny_vit(), train=images(), evaluated=images())
    trainer.train()
    assert of(trainer.model) == seen.at[3]


def test_options_of_the_decision_are_heard(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=None, mode="max", stopping_threshold=4.5)
    trainer = scripted(tmp_path, LifecycleCallback(early_stopping=stopping, monitor="score"))
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_decision_is_neither_taken_from_nor_forced_on_a_run_that_has_none(tmp_path: Path) -> None:
    break_off(new_trainer(tmp_path / "a", LifecycleCallback(), **EVERY_STEP))
    with_patience = new_trainer(tmp_path / "a", LifecycleCallback(patience=1, min_delta=1e9), **EVERY_STEP)
    with_patience.train(resume_from_checkpoint=True)
    assert with_patience.state.global_step == 6
    break_off(new_trainer(tmp_path / "b", LifecycleCallback(patience=9), **EVERY_STEP))
    without = new_trainer(tmp_path / "b", LifecycleCallback(), **EVERY_STEP)
    without.train(resume_from_checkpoint=True)
    whole = new_trainer(tmp_path / "c", LifecycleCallback(), **EVERY_STEP)
    whole.train()
    assert digests(without) == digests(whole)
