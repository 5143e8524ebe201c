"""Training's random numbers are moved by training alone, and where a save falls changes no weight."""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback

from .runs import Net, Rows, Stream, break_off, digests, new_trainer, require_same_end


def trained(output_dir: Path, *callbacks: TrainerCallback, **settings: Any) -> Trainer:
    trainer = new_trainer(output_dir, *callbacks, **settings)
    trainer.train()
    return trainer


def rows(trainer: Trainer, key: str = "loss") -> dict[int, float]:
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


class Evaluates(TrainerCallback):
    """Asks for an evaluation, after the callback under test did its part."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate = state.global_step in (1, 3)

    def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
        random.random()
        np.random.random_sample()
        torch.rand(1)


@pytest.mark.parametrize(
    "settings",
    [
        {"eval_strategy": "steps", "eval_steps": 1},
        {"eval_strategy": "steps", "eval_steps": 4},
        {"eval_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True},
        {"eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 0, "per_device_eval_batch_size": 1},
    ],
)
def test_training_does_not_depend_on_how_often_one_evaluates(tmp_path: Path, settings: dict[str, Any]) -> None:
    plain = trained(tmp_path / "plain", LifecycleCallback())
    evaluated = trained(tmp_path / "evaluated", LifecycleCallback(), **settings)
    assert digests(evaluated) == digests(plain)
    assert rows(evaluated) == rows(plain)


def test_an_evaluation_that_a_later_callback_asks_for_is_neutral_too(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", LifecycleCallback())
    evaluated = trained(tmp_path / "evaluated", LifecycleCallback(), Evaluates())
    assert sorted(rows(evaluated, "eval_loss")) == [1, 3]
    assert digests(evaluated) == digests(plain)


class Draws(TrainerCallback):
    """Draws at an event and remembers what it got."""

    def __init__(self, event: str) -> None:
        self.drawn: list[tuple[float, float]] = []
        setattr(self, event, self._draw)

    def _draw(self, *args: Any, **kwargs: Any) -> None:
        self.drawn.append((random.random(), float(np.random.random_sample())))


@pytest.mark.parametrize("first", [True, False])
def test_a_callback_that_draws_at_an_epochs_begin_gets_new_numbers_each_epoch(tmp_path: Path, first: bool) -> None:
    draws = Draws("on_epoch_begin")
    callbacks = [draws, LifecycleCallback()] if first else [LifecycleCallback(), draws]
    trained(tmp_path, *callbacks, max_steps=12)
    assert len({number for pair in draws.drawn for number in pair}) == 6


@pytest.mark.parametrize(
    ("event", "step"),
    [("on_epoch_begin", 4), ("on_epoch_begin", 6), ("on_step_begin", 6), ("on_step_end", 4), ("on_log", 6)],
)
def test_a_callback_that_draws_after_ours_draws_the_same_when_resumed(tmp_path: Path, event: str, step: int) -> None:
    whole = Draws(event)
    unbroken = trained(tmp_path / "whole", LifecycleCallback(), whole, max_steps=10)
    break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), Draws(event), max_steps=10), step=step)
    again = Draws(event)
    resumed = new_trainer(tmp_path / "broken", LifecycleCallback(), again, max_steps=10)
    resumed.train(resume_from_checkpoint=True)
    kept = again.drawn[1:] if event == "on_epoch_begin" else again.drawn  # the saved epoch's begin is heard again
    assert kept
    assert kept == whole.drawn[-len(kept) :]
    assert digests(resumed) == digests(unbroken)


def test_a_callback_that_draws_before_ours_draws_the_same_when_resumed_at_an_epochs_edge(tmp_path: Path) -> None:
    whole = Draws("on_epoch_begin")
    unbroken = trained(tmp_path / "whole", whole, LifecycleCallback(), max_steps=10)
    break_off(new_trainer(tmp_path / "broken", Draws("on_epoch_begin"), LifecycleCallback(), max_steps=10), step=4)
    again = Draws("on_epoch_begin")
    resumed = new_trainer(tmp_path / "broken", again, LifecycleCallback(), max_steps=10)
    resumed.train(resume_from_checkpoint=True)
    assert again.drawn[1:] == whole.drawn[1:]
    assert digests(resumed) == digests(unbroken)


class Noise(Net):
    """Draws from each generator in the forward pass."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            x = x + random.gauss(0, 0.1) + float(np.random.randn()) * 0.1 + torch.randn(()) * 0.1
        return super().forward(x, labels)


def noise() -> Noise:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Noise()


@pytest.mark.parametrize(("streamed", "step"), [(False, 4), (False, 6), (True, 2), (True, 4)])
def test_a_model_that_draws_goes_on_as_if_it_had_not_been_broken_off(tmp_path: Path, step: int, streamed: bool) -> None:
    def trainer(name: str) -> Trainer:
        data = {"train": Stream()} if streamed else {}
        return new_trainer(tmp_path / name, LifecycleCallback(), model=noise(), max_steps=8, **data)

    require_same_end(trainer, step=step)


def test_batches_depend_on_the_seed_and_training_on_its_own(tmp_path: Path) -> None:
    one = trained(tmp_path / "one", LifecycleCallback(), data_seed=1)
    two = trained(tmp_path / "two", LifecycleCallback(), data_seed=2)
    same = trained(tmp_path / "same", LifecycleCallback(), data_seed=1)
    assert digests(one) == digests(same)
    assert digests(one) != digests(two)


# Log rows, and the ends of epochs and of runs.


def history(trainer: Trainer) -> list[dict[str, Any]]:
    clock = ("runtime", "per_second", "flos")
    return [
        {key: value for key, value in row.items() if not any(word in key for word in clock)}
        for row in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"logging_steps": 5},
        {"logging_strategy": "epoch"},
        {"logging_strategy": "no"},
        {"logging_steps": 3, "logging_first_step": True},
        {"save_strategy": "epoch", "eval_strategy": "epoch"},
        {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
        {"gradient_accumulation_steps": 3, "save_steps": 1},
    ],
)
@pytest.mark.parametrize("step", [4, 6])
def test_the_log_is_that_of_the_unbroken_run(tmp_path: Path, settings: dict[str, Any], step: int) -> None:
    whole = trained(tmp_path / "whole", LifecycleCallback(), max_steps=8, **settings)
    break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), max_steps=8, **settings), step=step)
    resumed = new_trainer(tmp_path / "broken", LifecycleCallback(), max_steps=8, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert history(resumed) == history(whole)
    assert digests(resumed) == digests(whole)


def test_a_save_adds_no_log_row(tmp_path: Path) -> None:
    logged = trained(tmp_path, LifecycleCallback(), logging_steps=5)
    assert sorted(rows(logged)) == [5]


def test_a_run_that_had_ended_is_not_trained_or_saved_again(tmp_path: Path) -> None:
    ended = trained(tmp_path, LifecycleCallback())
    before = (tmp_path / "checkpoint-6" / "trainer_state.json").stat().st_mtime_ns
    again = new_trainer(tmp_path, LifecycleCallback())
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert digests(again) == digests(ended)
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").stat().st_mtime_ns == before


class Drawing(Rows):
    """Rows that draw from each generator."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        random.random()
        np.random.random_sample()
        torch.rand(1)
        return super().__getitem__(index)


class Predicts(TrainerCallback):
    """Predicts, or evaluates, in the middle of training at the steps ``at``."""

    def __init__(self, method: str, at: tuple[int, ...]) -> None:
        self.method, self.at = method, at
        self.trainer: Trainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.at and self.trainer is not None:
            getattr(self.trainer, self.method)(Drawing(6, seed=2))


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", ["predict", "evaluate"])
def test_a_callback_that_predicts_or_evaluates_leaves_training_alone(tmp_path: Path, method: str, first: bool) -> None:
    def trained_with(name: str, at: tuple[int, ...]) -> Trainer:
        predicts, ours = Predicts(method, at), LifecycleCallback()
        callbacks = [predicts, ours] if first else [ours, predicts]
        predicts.trainer = new_trainer(tmp_path / name, *callbacks, model=noise())
        predicts.trainer.train()
        return predicts.trainer

    assert digests(trained_with("predicts", (1, 3))) == digests(trained_with("plain", ()))


def test_elastic_run_resumes_exactly_and_what_depends_on_ranks_is_named_before_it_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def trainer(place: str, rows: int) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
        return new_trainer(tmp_path / place, LifecycleCallback(elastic=True), model=Wrapped(model), train=Rows(rows))

    whole = trainer("whole", 16)
    with caplog.at_level(logging.WARNING, "hf_lifecycle"):
        whole.train()
    assert [line for line in caplog.messages if "elastic" in line] == [
        "not exact: elastic=True: running statistics (BatchNorm1d) are those of rank 0's micro-batches, or of a group "
        "of ranks: with another number of processes they become others"
    ]
    break_off(trainer("run", 16), step=5)
    resumed = trainer("run", 16)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)
    caplog.clear()
    trainer("uneven", 18).train()
    assert any("the last step of an epoch has only 2 of 4 examples" in line for line in caplog.messages)
    caplog.clear()
    new_trainer(
        tmp_path / "counted", LifecycleCallback(elastic=True), with_trainer={"data_collator": Counted()}
    ).train()
    assert [line for line in caplog.messages if "elastic=" in line] == [
        "not exact: elastic=True: the state of collate_fn.data_collator follows the batches that one process makes: "
        "with another number of processes it becomes another"
    ]


class Counted:
    """A collator with a state."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.count += 1
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Wrapped(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": nn.functional.mse_loss(self.layers(x).squeeze(-1), labels)}
