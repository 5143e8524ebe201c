"""Early stopping under settings other than those of the stop, and a metric that does not come."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import EarlyStopping, LifecycleCallback
from hf_lifecycle.errors import MetricNotFound
from tests.accelerator.tiny import Script, new_script
from tests.trainer.runs import Rows, digests, new_trainer

SCORES = (0.9, 0.5, 0.8, 0.7, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6, 0.6)
BY_STEPS: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}


class Scripted(TrainerCallback):
    """Sets the metric of each evaluation by the step at which it is made."""

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = SCORES[state.global_step]


class Foreign(TrainerCallback):
    """Evaluates the training set under a prefix of its own between steps."""

    trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.evaluate(self.trainer.train_dataset, metric_key_prefix="train")


def _run(directory: Path, stopping: EarlyStopping, *, resume: bool = False, **settings: Any) -> Any:
    ours = LifecycleCallback(early_stopping=stopping)
    trainer = new_trainer(directory, Scripted(), ours, **{**BY_STEPS, "save_steps": 1, "max_steps": 11, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def _evaluations(trainer: Any) -> list[tuple[int, float]]:
    return [(row["step"], row["eval_loss"]) for row in trainer.state.log_history if "eval_loss" in row]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"patience": 2}, {"patience": 5}),
        ({"patience": 2}, {"patience": None}),
        ({"patience": 2, "patience_unit": "steps"}, {"patience": 4, "patience_unit": "steps"}),
        ({"patience": 2, "patience_unit": "seconds"}, {"patience": 1e6, "patience_unit": "seconds"}),
        ({"stopping_threshold": 0.55, "patience": 6}, {"stopping_threshold": 0.1, "patience": 6}),
        ({"divergence_threshold": 0.75, "start_after": 1}, {"divergence_threshold": 2.0, "start_after": 1}),
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_steps": 9},
        {"save_strategy": "epoch", "max_steps": 8},
        {"logging_strategy": "epoch"},
    ],
    ids=lambda given: "-".join(map(str, given.values())) or "plain",
)
def test_run_stopped_goes_on_under_wider_limits_as_if_they_had_been_given_first(
    before: dict[str, Any], after: dict[str, Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    if before.get("patience_unit") == "seconds":
        before = {**before, "patience": 0.0}
    stopped = _run(tmp_path / "stopped", EarlyStopping(**before), **settings)
    assert stopped.state.global_step < stopped.state.max_steps
    resumed_by, whole_by = EarlyStopping(**after), EarlyStopping(**after)
    resumed = _run(tmp_path / "stopped", resumed_by, resume=True, **settings)
    whole = _run(tmp_path / "whole", whole_by, **settings)
    assert resumed.state.global_step == whole.state.global_step > stopped.state.global_step
    assert digests(resumed) == digests(whole)
    assert _evaluations(resumed) == _evaluations(whole)
    assert (resumed_by.best_metric, resumed_by.counter) == (whole_by.best_metric, whole_by.counter)
    assert resumed_by.should_stop == whole_by.should_stop


def test_resume_says_that_the_stop_holds_no_longer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _run(tmp_path, EarlyStopping(patience=2))
    with caplog.at_level(logging.INFO, logger="hf_lifecycle"):
        _run(tmp_path, EarlyStopping(patience=5), resume=True)
    assert (
        "early stopping had ended the run (no improvement on the best, 0.5, in 2 evaluations); with the settings given "
        "now, training continues"
    ) in caplog.text


@pytest.mark.parametrize("patience", [1, 2])
def test_stop_stands_where_the_patience_is_no_larger(patience: int, tmp_path: Path) -> None:
    stopped = _run(tmp_path, EarlyStopping(patience=2))
    again = _run(tmp_path, EarlyStopping(patience=patience), resume=True)
    assert again.state.global_step == stopped.state.global_step
    assert digests(again) == digests(stopped)


def test_run_by_epochs_that_was_stopped_goes_on(tmp_path: Path) -> None:
    def run(directory: Path, patience: int, *, resume: bool = False) -> Any:
        ours = LifecycleCallback(patience=patience, min_delta=1e9)
        by_epoch: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
        trainer = new_trainer(directory, ours, max_steps=-1, num_train_epochs=6, **by_epoch)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    assert run(tmp_path / "stopped", 1).state.epoch == 2
    resumed, whole = run(tmp_path / "stopped", 3, resume=True), run(tmp_path / "whole", 3)
    assert resumed.state.epoch == whole.state.epoch == 4
    assert digests(resumed) == digests(whole)
    assert _evaluations(resumed) == _evaluations(whole)


# Loops


def _loop(directory: Path, patience: int, leave: str, save: str) -> tuple[Script, list[float]]:
    """Evaluates after each third step; leaves by ``leave`` where it is told to stop, and saves at ``save``."""
    early = EarlyStopping(patience=patience)
    script = new_script(directory, objects={"early": early}, generators=3)
    manager, seen = script.manager, []
    manager.resume()

    def score() -> float:
        seen.append(SCORES[manager.progress.step // 3])
        return seen[-1]

    for _ in manager.epochs(5):
        for batch in manager.batches(script.loader):
            script.train(batch)
            stops = leave in ("inner", "both") and manager.progress.step % 3 == 0 and early.step(score())
            if save == "step":
                manager.save()
            if stops:
                break
        if leave in ("outer", "epoch") and early.step(score()) and leave == "outer":
            break
        if leave == "both" and early.should_stop:
            break
        if save == "epoch":
            manager.save()
    if save == "end":
        manager.save()
    manager.close()
    return script, seen


@pytest.mark.parametrize("save", ["step", "epoch", "end"])
@pytest.mark.parametrize("leave", ["inner", "both", "outer", "epoch"])
def test_loop_stopped_goes_on_with_a_larger_patience(leave: str, save: str, tmp_path: Path) -> None:
    stopped, seen = _loop(tmp_path / "stopped", 2, leave, save)
    resumed, seen_later = _loop(tmp_path / "stopped", 4, leave, save)
    whole, seen_at_once = _loop(tmp_path / "whole", 4, leave, save)
    assert resumed.manager.progress.step == whole.manager.progress.step > stopped.manager.progress.step
    assert resumed.digests() == whole.digests()
    assert seen_at_once[-len(seen_later) :] == seen_later
    if save == "end":
        assert seen + seen_later == seen_at_once


@pytest.mark.parametrize("save", ["step", "epoch", "end"])
@pytest.mark.parametrize("leave", ["inner", "both", "outer", "epoch"])
def test_loop_stopped_stays_stopped_with_the_same_patience(leave: str, save: str, tmp_path: Path) -> None:
    stopped, _ = _loop(tmp_path, 2, leave, save)
    again, seen = _loop(tmp_path, 2, leave, save)
    assert again.manager.progress.step == stopped.manager.progress.step
    assert again.digests() == stopped.digests()
    assert len(seen) <= 1


# A metric that does not come


def test_metric_may_come_later_than_the_first_evaluation(tmp_path: Path) -> None:
    class Later(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
            if state.global_step >= 3:
                metrics["eval_score"] = 1.0

    ours = LifecycleCallback(patience=3, monitor="score")
    trainer = new_trainer(tmp_path, Later(), ours, max_steps=9, **BY_STEPS)
    trainer.train()
    assert trainer.state.global_step == 6
    assert ours.early_stopping is not None
    assert ours.early_stopping.evaluations == 4


@pytest.mark.parametrize(
    ("given", "step"),
    [
        ({"patience": 0}, 1),
        ({"patience": 1}, 1),
        ({"patience": 3}, 3),
        ({"patience": 2, "patience_unit": "steps"}, 3),
        ({"patience": 8, "patience_unit": "samples"}, 3),
        ({"patience": None}, 6),
        ({"patience": 50}, 6),
    ],
)
@pytest.mark.parametrize("evaluated", [None, {"a": Rows(4), "b": Rows(4)}], ids=["one", "two"])
def test_metric_that_never_came_is_an_error_when_patience_has_passed_or_training_ends(
    given: dict[str, Any], step: int, evaluated: Any, tmp_path: Path
) -> None:
    ours = LifecycleCallback(early_stopping=EarlyStopping(**given), monitor="score")
    foreign = Foreign()
    trainer = foreign.trainer = new_trainer(tmp_path, foreign, ours, evaluated=evaluated, **BY_STEPS)
    with pytest.raises(MetricNotFound, match=r"'score'.*eval_(a_)?loss") as raised:
        trainer.train()
    assert trainer.state.global_step == step
    assert not [name for name in raised.value.available if name.startswith("train_")]


def test_training_that_ends_before_its_first_evaluation_is_told_and_not_ended(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = Foreign()
    ours = LifecycleCallback(patience=2)
    trainer = foreign.trainer = new_trainer(tmp_path, foreign, ours, eval_strategy="epoch", eval_delay=100)
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert "early stopping had no effect: no evaluation reported eval_loss before training ended" in caplog.text
