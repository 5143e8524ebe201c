"""Runs that were found to end otherwise than their unbroken twins, or to leave something behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import EarlyStopping, LifecycleCallback

from .runs import BrokenOff, Net, Rows, Stream, break_off, digests, images, new_trainer, require_same_end, tiny_vit

_EVERY_EPOCH = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}


def _log(trainer: Trainer) -> list[dict[str, Any]]:
    clocks = ("_runtime", "_per_second")
    return [{k: v for k, v in row.items() if not k.endswith(clocks)} for row in trainer.state.log_history]


def _run(output_dir: Path, **settings: Any) -> Trainer:
    trainer = new_trainer(output_dir, LifecycleCallback(), **settings)
    trainer.train()
    return trainer


# --- where a run ended in the middle of an epoch


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 6}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": 6, "save_strategy": "best"}],
)
def test_a_run_that_ended_within_an_epoch_that_it_saved_at_the_end_of_may_be_resumed(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**_EVERY_EPOCH, "metric_for_best_model": "eval_loss", **settings}
    ended = _run(tmp_path, **settings)
    saved = sorted(tmp_path.glob("checkpoint-*"))
    again = new_trainer(tmp_path, LifecycleCallback(), **settings)
    again.train(resume_from_checkpoint=True)
    assert digests(again) == digests(ended)
    assert _log(again) == _log(ended)
    assert sorted(tmp_path.glob("checkpoint-*")) == saved


def test_a_run_that_was_stopped_within_an_epoch_may_be_resumed(tmp_path: Path) -> None:
    settings = {"save_strategy": "epoch", "eval_strategy": "steps", "eval_steps": 1, "max_steps": 12}
    stopping = {"stopping_threshold": 1e9, "start_after": 5}
    ended = new_trainer(tmp_path, LifecycleCallback(early_stopping=EarlyStopping(**stopping)), **settings)
    ended.train()
    assert ended.state.global_step == 6
    again = new_trainer(tmp_path, LifecycleCallback(early_stopping=EarlyStopping(**stopping)), **settings)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert digests(again) == digests(ended)


class _StopsAt(TrainerCallback):
    """Ends a job whose time is up."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop |= state.global_step == 5
        return control


@pytest.mark.parametrize("data", [Rows, Stream])
def test_a_run_that_others_stopped_within_an_epoch_goes_on_within_it(tmp_path: Path, data: Any) -> None:
    settings = {"save_strategy": "epoch", "max_steps": 12}
    unbroken = _run(tmp_path / "unbroken", train=data(), **settings)
    new_trainer(tmp_path, LifecycleCallback(), _StopsAt(), train=data(), **settings).train()
    resumed = new_trainer(tmp_path, LifecycleCallback(), train=data(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)


# --- what an optimizer step, a log row and a count carry over a save


@pytest.mark.parametrize("rows", [18, 20])
def test_gradients_that_a_stream_leaves_over_at_its_end_reach_the_next_step(tmp_path: Path, rows: int) -> None:
    settings = {"train": Stream(rows), "gradient_accumulation_steps": 2, "save_strategy": "epoch", "logging_steps": 1}
    unbroken = _run(tmp_path / "unbroken", **settings)
    break_off(new_trainer(tmp_path, LifecycleCallback(), **settings), step=3)
    resumed = new_trainer(tmp_path, LifecycleCallback(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)
    assert _log(resumed) == _log(unbroken)


def test_stream_that_is_resumed_twice_between_its_passes_leaves_out_none(tmp_path: Path) -> None:
    settings = {"train": Stream(16), "save_strategy": "epoch", "logging_steps": 1, "max_steps": 16}
    unbroken = _run(tmp_path / "unbroken", **settings)
    break_off(new_trainer(tmp_path, LifecycleCallback(), **settings), step=6)
    break_off(new_trainer(tmp_path, LifecycleCallback(), **settings), step=10, resume=True)
    resumed = new_trainer(tmp_path, LifecycleCallback(), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert _log(resumed) == _log(unbroken)
    assert digests(resumed) == digests(unbroken)


class _SavesAt(TrainerCallback):
    def __init__(self, event: str, step: int) -> None:
        self._step = step
        setattr(self, event, self._ask)

    def _ask(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save |= state.global_step == self._step
        return control


@pytest.mark.parametrize("event", ["on_step_end", "on_log", "on_evaluate"])
def test_a_save_that_others_ask_for_between_two_log_rows_leaves_the_log_as_it_is(tmp_path: Path, event: str) -> None:
    step = 5 if event == "on_log" else 3
    settings = {"save_strategy": "no", "logging_steps": 5, "max_steps": 12, "eval_strategy": "steps", "eval_steps": 1}

    def make(name: str) -> Trainer:
        return new_trainer(tmp_path / name, LifecycleCallback(), _SavesAt(event, step), **settings)

    resumed, unbroken = require_same_end(make, step=6)
    assert _log(resumed) == _log(unbroken)


# --- the same objects again, as in a notebook


def test_the_trainer_that_was_broken_off_counts_no_operation_twice(tmp_path: Path) -> None:
    data = {"train": images(), "evaluated": images(6)}
    unbroken = _run(tmp_path / "unbroken", model=tiny_vit(), **data)
    broken = break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), model=tiny_vit(), **data), step=3)
    broken.train(resume_from_checkpoint=True)
    assert broken.state.total_flos == unbroken.state.total_flos > 0
    assert _log(broken) == _log(unbroken)


def test_the_order_is_that_of_the_run_resumed_whatever_was_seeded_before(tmp_path: Path) -> None:
    unbroken = _run(tmp_path / "unbroken", max_steps=8)
    broken = break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), max_steps=8), step=2)
    torch.manual_seed(99)
    broken.train(resume_from_checkpoint=True)
    assert digests(broken) == digests(unbroken)


class _Counting(Net):
    """Counts its batches in a buffer that no checkpoint of Trainer's holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.training:
            self.seen += 1
        return super().forward(x, labels)


def test_a_buffer_is_saved_also_where_its_trainer_had_it_from_an_earlier_attempt(tmp_path: Path) -> None:
    def make() -> Trainer:
        torch.manual_seed(3)
        return new_trainer(tmp_path, LifecycleCallback(), model=_Counting(), max_steps=8)

    twice = break_off(make(), step=6)
    break_off(twice, step=7, resume=str(tmp_path / "checkpoint-4"))
    fresh = make()
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert fresh.model.seen == 8


def _restoring_best() -> LifecycleCallback:
    return LifecycleCallback(early_stopping=EarlyStopping(patience=None, restore_best=True))


def test_arguments_that_a_broken_training_changed_are_given_back_to_the_next_trainer(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 5}
    broken = new_trainer(tmp_path, _restoring_best(), **settings)
    before = broken.args.to_dict()
    break_off(broken)
    data = {"train_dataset": Rows(), "eval_dataset": Rows(6)}
    again = Trainer(Net(), broken.args, callbacks=[LifecycleCallback()], **data)
    assert again.args.to_dict() == before


def test_a_callback_takes_nothing_from_one_training_to_another(tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2}
    callback = _restoring_best()
    break_off(new_trainer(tmp_path / "broken", callback, **settings))
    other = new_trainer(tmp_path / "other", callback, load_best_model_at_end=True, save_total_limit=5, **settings)
    before = other.args.to_dict()
    other.train()
    assert other.args.to_dict() == before


class _Interrupting(Stream):
    """A stream that is interrupted while a resumed run skips what it has seen."""

    def __iter__(self) -> Any:
        raise BrokenOff


def test_a_run_interrupted_while_it_skips_may_be_resumed_with_the_same_arguments(tmp_path: Path) -> None:
    unbroken = _run(tmp_path / "unbroken", train=Stream())
    broken = break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), train=Stream()))
    broken.train_dataset = _Interrupting()
    with pytest.raises(BrokenOff):
        broken.train(resume_from_checkpoint=True)
    again = new_trainer(tmp_path / "unused", train=Stream())
    resumed = Trainer(again.model, broken.args, train_dataset=Stream(), callbacks=[LifecycleCallback()])
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)


def test_a_generator_that_draws_while_a_checkpoint_is_saved_moves_nothing(tmp_path: Path) -> None:
    class Sampling(TrainerCallback):
        def on_save(self, *args: Any, **kwargs: Any) -> None:
            torch.rand(1), np.random.rand()

    unbroken = new_trainer(tmp_path / "unbroken", LifecycleCallback(), Sampling())
    unbroken.train()
    break_off(new_trainer(tmp_path / "broken", LifecycleCallback(), Sampling()), step=3)
    resumed = new_trainer(tmp_path / "broken", LifecycleCallback(), Sampling())
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)


# --- what cannot be exact is named


@pytest.mark.parametrize(
    ("settings", "callbacks", "named"),
    [
        ({"dataloader_in_order": False, "dataloader_num_workers": 2}, [], "dataloader_in_order"),
        (
            {
                "eval_strategy": "steps",
                "eval_steps": 2,
                "metric_for_best_model": "loss",
                "load_best_model_at_end": True,
            },
            [EarlyStoppingCallback(9)],
            "EarlyStoppingCallback",
        ),
    ],
    ids=["order of workers", "stock early stopping"],
)
def test_what_a_resume_would_lose_is_named_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, settings: dict[str, Any], callbacks: list[Any], named: str
) -> None:
    if missing := [name for name in settings if not hasattr(TrainingArguments, name)]:
        pytest.skip(f"this version has no {missing[0]}")
    with caplog.at_level("WARNING", logger="hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(), *callbacks, **settings).train()
    assert [line for line in caplog.messages if line.startswith("not exact") and named in line]


def test_a_generator_that_a_collator_took_from_around_it_is_seeded(tmp_path: Path) -> None:
    def make(output_dir: Path) -> Trainer:
        generator = np.random.default_rng(5)

        def noisy(rows: list[Any]) -> Any:
            batch = default_collate(rows)
            return {**batch, "x": batch["x"] + generator.random()}

        return new_trainer(output_dir, LifecycleCallback(), with_trainer={"data_collator": noisy})

    unbroken = make(tmp_path / "unbroken")
    unbroken.train()
    break_off(make(tmp_path / "broken"), step=3)
    resumed = make(tmp_path / "broken")
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(unbroken)
