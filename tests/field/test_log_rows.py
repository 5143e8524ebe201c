"""The log of a run with the callback has the rows of stock Trainer, and has them after a break at any save, too.

Batches come in order and nothing is dropped out here, so that a run of stock Trainer is the same training.
"""

from __future__ import annotations

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from tests.field.limits import Limit
from tests.trainer.runs import BrokenOff, Net, Rows, Stream, break_off, digests, new_trainer


class InOrder(Trainer):
    """Takes the rows as they are, and counts its saves, whoever asks for them; ends training after one of them."""

    saves = 0
    last_save = -1

    def _get_train_sampler(self, *given: Any, **named: Any) -> Any:
        return SequentialSampler(self.train_dataset)

    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        super()._save_checkpoint(*given, **named)
        self.saves += 1
        if self.saves == self.last_save:
            raise BrokenOff


class Against(Rows):
    """Rows on which training makes the loss rise, so that the first evaluation is the best."""

    def __init__(self) -> None:
        super().__init__(6, seed=2)
        self.labels = -10 * self.labels


class Asks(TrainerCallback):
    """Asks for a save at an event at some steps; or, ``at_once``, makes it there."""

    def __init__(self, event: str, *steps: int, at_once: bool = False) -> None:
        self.trainer: Any = None
        self._steps, self._at_once = steps, at_once
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self._steps or "loss" not in kwargs.get("logs", {"loss": 0}):
            return
        if self._at_once:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)
        else:
            control.should_save = True


class Counts(TrainerCallback):
    """Counts what it hears, in the order of Trainer's loop."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.evaluated: list[int] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun.append(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ended.append(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.evaluated.append(state.global_step)


@dataclass
class Run:
    """What is trained, and by which callbacks beside ours; four steps are an epoch."""

    settings: dict[str, Any]
    others: Any = list
    patience: int | None = None
    data: type = Rows
    evaluated: type = Rows

    def trainer(self, place: Path, *, ours: bool = True) -> Any:
        model = Net()
        model.layers[1] = torch.nn.Identity()
        counts, others = Counts(), self.others()
        own = [LifecycleCallback(patience=self.patience)] if ours else []
        if not ours and self.patience is not None:
            own = [EarlyStoppingCallback(self.patience)]
        with torch.random.fork_rng():
            torch.manual_seed(3)
            for one in model.parameters():
                torch.nn.init.normal_(one, std=0.3)
        settings = {"max_steps": 10, "learning_rate": 3e-2, **self.settings}
        evaluated = self.evaluated() if self.evaluated is Against else Rows(6, seed=2)
        made: Any = new_trainer(
            place,
            *others,
            counts,
            *own,
            model=model,
            train=self.data(),
            evaluated=evaluated,
            kind=InOrder,
            **settings,
        )
        made.counts = counts
        for one in others:
            if isinstance(one, Asks):
                one.trainer = made
        return made


def by_steps(logging: int, save: int, evaluation: int, **more: Any) -> dict[str, Any]:
    return {"logging_steps": logging, "save_steps": save, "eval_strategy": "steps", "eval_steps": evaluation, **more}


BY_EPOCH = {"logging_strategy": "epoch", "eval_strategy": "epoch"}
BEST = {"metric_for_best_model": "eval_loss", "load_best_model_at_end": True, "greater_is_better": False}
PLATEAU = {
    "lr_scheduler_type": "reduce_lr_on_plateau",
    "lr_scheduler_kwargs": {"patience": 0, "mode": "min"},
    "metric_for_best_model": "eval_loss",
}

STREAM = {"accelerator_config": {"dispatch_batches": False}}

AMID_AN_EVALUATION = Limit(
    "a direct call of `_save_checkpoint` in the middle of an evaluation, such as in `on_evaluate`",
    "at a save",
    "not exact: step … is saved in the middle of an evaluation, so a resumed run repeats that evaluation, or loses "
    "its best metric; set control.should_save there, and Trainer saves after the evaluation",
)

RUNS = {
    "steps that do not divide each other": Run(by_steps(3, 2, 5)),
    "a log row at the first step": Run(by_steps(5, 3, 4, logging_first_step=True)),
    "no log row of training at all": Run({"logging_strategy": "no", "eval_strategy": "epoch", "save_steps": 4}),
    "log rows and evaluations by epoch, a save at its last step": Run({**BY_EPOCH, "save_steps": 2}),
    "log rows by step, evaluations by epoch": Run({"logging_steps": 3, "eval_strategy": "epoch", "save_steps": 4}),
    "saves by epoch": Run(by_steps(3, 0, 5, save_strategy="epoch")),
    "all by epoch": Run({**BY_EPOCH, "save_strategy": "epoch"}),
    "ends within an epoch": Run({**BY_EPOCH, "save_steps": 5}),
    "ends within an epoch, by number of epochs": Run({**BY_EPOCH, "save_steps": 3, "max_steps": -1}),
    "an evaluation before the first step": Run(by_steps(3, 4, 4, eval_on_start=True)),
    "a step of less accumulation at an epoch's end": Run(
        {**BY_EPOCH, "gradient_accumulation_steps": 3, "save_steps": 1, "max_steps": 5}
    ),
    "a plateau that a schedule waits for": Run({**BY_EPOCH, **PLATEAU, "save_steps": 4}, evaluated=Against),
    "the best, by epoch": Run({**BY_EPOCH, **BEST, "save_strategy": "epoch"}),
    "the best, by its evaluation": Run({"logging_steps": 3, "eval_strategy": "epoch", "save_strategy": "best", **BEST}),
    "stopped early, at an epoch's end after its save": Run(
        {**BY_EPOCH, "save_steps": 4, "metric_for_best_model": "eval_loss"}, patience=1, evaluated=Against
    ),
    "stopped early, with the best at the end": Run(
        {"logging_steps": 5, "eval_strategy": "epoch", "save_strategy": "epoch", **BEST}, patience=1, evaluated=Against
    ),
    "stopped early, in an epoch": Run(by_steps(2, 3, 3, **BEST), patience=1, evaluated=Against),
    "asked for at a step's end": Run({**BY_EPOCH, "save_strategy": "no"}, lambda: [Asks("on_step_end", 3, 4, 8, 10)]),
    "asked for at an epoch's end": Run(
        {"logging_steps": 3, "eval_strategy": "epoch", "save_steps": 2}, lambda: [Asks("on_epoch_end", 4, 8)]
    ),
    "asked for at an evaluation": Run(by_steps(5, 100, 2), lambda: [Asks("on_evaluate", 2, 4, 8)]),
    "asked for at a log row": Run(by_steps(2, 100, 4), lambda: [Asks("on_log", 2, 4, 6)]),
    "a stream, saved at its end": Run({**BY_EPOCH, **STREAM, "save_steps": 4}, data=Stream),
    "a stream, saved within": Run(by_steps(3, 3, 4, **STREAM), data=Stream),
    "made by a callback at a step's end": Run(
        {"logging_steps": 4, "eval_strategy": "epoch", "save_steps": 8},
        lambda: [Asks("on_step_end", 3, 4, 8, 10, at_once=True)],
    ),
    "made by a callback before an evaluation": Run(
        by_steps(2, 6, 2, metric_for_best_model="eval_loss"),
        lambda: [Asks("on_log", 2, 4, 8, at_once=True)],
        patience=1,
        evaluated=Against,
    ),
    "made by a callback at an epoch's end": Run(
        {**BY_EPOCH, "save_steps": 3}, lambda: [Asks("on_epoch_end", 4, 8, at_once=True)]
    ),
}


def rows(trainer: Trainer) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]


def outcome(trainer: Any) -> dict[str, Any]:
    """What must be the same: the log, the weights, the best, and which events came when."""
    state = trainer.state
    told = {"rows": rows(trainer), "step": state.global_step, "best": (state.best_metric, state.best_global_step)}
    return {**told, **digests(trainer), **vars(trainer.counts)}


@pytest.mark.parametrize("name", RUNS)
def test_log_is_that_of_stock_trainer_whether_or_not_the_run_was_broken_off_at_a_save(
    name: str, tmp_path: Path
) -> None:
    run = RUNS[name]
    stock, whole = run.trainer(tmp_path / "stock", ours=False), run.trainer(tmp_path / "whole")
    stock.train()
    whole.train()
    assert outcome(whole) == outcome(stock)
    assert whole.saves == stock.saves > 1
    for number in range(1, stock.saves + 1):
        place = tmp_path / str(number)
        broken, resumed = run.trainer(place), run.trainer(place)
        broken.last_save = number
        with pytest.raises(BrokenOff):
            broken.train()
        resumed.train(resume_from_checkpoint=latest_checkpoint(place))
        assert outcome(resumed) == outcome(stock), f"broken off after save {number}"


class Noisy(Rows):
    """An evaluation that draws from every global generator."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        noise = random.random() + float(np.random.random_sample()) + float(torch.rand(()))
        return {"x": self.x[index] + noise, "labels": self.labels[index]}


@pytest.mark.parametrize("name", ["all by epoch", "log rows and evaluations by epoch, a save at its last step"])
def test_random_numbers_are_those_of_the_unbroken_run_where_the_end_of_an_epoch_was_due(
    name: str, tmp_path: Path
) -> None:
    def trainer(place: Path) -> Any:
        return new_trainer(place, LifecycleCallback(), evaluated=Noisy(6), kind=Breaks, **RUNS[name].settings)

    class Breaks(InOrder):
        _get_train_sampler = Trainer._get_train_sampler

        def train(self, *given: Any, **named: Any) -> Any:
            ended = super().train(*given, **named)
            self.drawn = random.random(), float(np.random.random_sample()), float(torch.rand(()))
            return ended

    whole = trainer(tmp_path / "whole")
    whole.train()
    for number in range(1, whole.saves + 1):
        place = tmp_path / str(number)
        broken, resumed = trainer(place), trainer(place)
        broken.last_save = number
        with pytest.raises(BrokenOff):
            broken.train()
        resumed.train(resume_from_checkpoint=latest_checkpoint(place))
        assert rows(resumed) == rows(whole)
        assert digests(resumed) == digests(whole)
        assert resumed.drawn == whole.drawn, f"broken off after save {number}"


def test_patience_of_transformers_own_callback_is_kept_and_no_line_says_anything_about_us(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {**BY_EPOCH, **BEST, "save_strategy": "epoch", "restore_callback_states_from_checkpoint": True}
    run = Run({**settings, "max_steps": 20}, lambda: [EarlyStoppingCallback(2)], evaluated=Against)
    stock = run.trainer(tmp_path / "stock", ours=False)
    stock.train()
    assert stock.state.global_step == 12
    for number in (1, 2, 3):
        place = tmp_path / str(number)
        broken, resumed = run.trainer(place), run.trainer(place)
        broken.last_save = number
        with pytest.raises(BrokenOff):
            broken.train()
        caplog.clear()
        resumed.train(resume_from_checkpoint=latest_checkpoint(place))
        assert outcome(resumed) == outcome(stock)
        assert "not included" not in caplog.text
        without = run.trainer(place, ours=False)  # stock Trainer finds no trace of us either
        without.train(resume_from_checkpoint=latest_checkpoint(place))
        assert "not included" not in caplog.text


def test_save_in_the_middle_of_an_evaluation_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(by_steps(2, 100, 2), lambda: [Asks("on_evaluate", 4, at_once=True)]).trainer(tmp_path).train()
    AMID_AN_EVALUATION.require_told(caplog.text)


def test_callback_that_returns_a_control_of_its_own_costs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Copies(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return copy.deepcopy(control)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return copy.copy(control)

    def make(folder: Path, *, last: bool) -> Trainer:
        callbacks = (LifecycleCallback(), Copies()) if last else (Copies(), LifecycleCallback())
        return new_trainer(folder, *callbacks, max_steps=8, eval_strategy="epoch", save_strategy="epoch")

    for last in (False, True):
        whole = make(tmp_path / f"whole-{last}", last=last)
        whole.train()
        break_off(make(tmp_path / f"broken-{last}", last=last), step=5)
        resumed = make(tmp_path / f"broken-{last}", last=last)
        resumed.train(resume_from_checkpoint=True)
        assert digests(resumed) == digests(whole)
    assert "not exact" not in caplog.text


class Evaluates(TrainerCallback):
    """Evaluates, and logs, at events that a resumed run hears once more."""

    trainer: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log({"parameters": 49.0})

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.evaluate(metric_key_prefix="train")


@pytest.mark.parametrize("step", [2, 4, 6], ids=["within the first epoch", "at its end", "within the second"])
def test_rows_of_events_that_are_heard_once_more_are_not_logged_twice(step: int, tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        callback = Evaluates()
        callback.trainer = new_trainer(tmp_path / folder, callback, LifecycleCallback(), max_steps=8)
        return cast("Trainer", callback.trainer)

    whole = make("whole")
    whole.train()
    break_off(make("broken"), at="on_step_begin", step=step)
    resumed = make("broken")
    resumed.train(resume_from_checkpoint=True)
    assert rows(resumed) == rows(whole)
