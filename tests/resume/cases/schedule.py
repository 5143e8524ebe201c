"""Cases of when Trainer logs, evaluates and saves, and of the moment at which it is broken off."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from ..harness import Attempt, Break, Case
from .tiny import NOISES, Rows, regression

__all__ = ["CASES"]

EPOCHS: dict[str, Any] = {"max_steps": -1, "num_train_epochs": 2}
ELSEWHERE = "another"


def _train(run: Attempt, **settings: Any) -> Trainer:
    """With the option ``noise``, on data that are augmented as they are fetched."""
    noise = run.options.get("noise")
    return regression(run, train=Rows(noise=NOISES[noise] if noise is not None else None), **settings)


def _case(name: str, about: str, *breaks: Break, core: bool = False, **settings: Any) -> Case:
    return Case(name, about, lambda run: _train(run, **settings), breaks=breaks or (Break(10),), core=core)


class _SaveAt(TrainerCallback):
    """Asks for a save at one step, whatever the save strategy."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= state.global_step == self.step


def _saved_by_hand(run: Attempt) -> Trainer:
    return regression(run, save_strategy="no", callbacks=[_SaveAt(7), *run.callbacks()])


def moved(output_dir: Path) -> tuple[Path, str | bool]:
    """The directory was renamed since."""
    return output_dir.rename(output_dir.with_name("moved")), True


def into_another_directory(output_dir: Path) -> tuple[Path, str | bool]:
    """Resume from a path, but go on in another directory."""
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return output_dir.with_name(ELSEWHERE), str(newest)


def from_a_copy(output_dir: Path) -> tuple[Path, str | bool]:
    """Only the newest checkpoint was brought to another machine."""
    newest = max(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    copy = output_dir.with_name("copy")
    shutil.copytree(newest, copy / newest.name)
    shutil.rmtree(output_dir)
    return copy, str(copy / newest.name)


EDGE = (
    _case("edge_steps", "a save by steps at an epoch's last step", Break(8), save_steps=6),
    _case("edge_epoch", "a save by epoch", Break(8), save_strategy="epoch", core=True),
    _case("edge_first_step", "interrupted in the first step after it", Break(6), save_strategy="epoch"),
    _case(
        "edge_steps_eval_epoch",
        "a save at an epoch's last step, an evaluation by epoch",
        Break(8),
        save_steps=6,
        eval_strategy="epoch",
    ),
    _case(
        "edge_epoch_begin",
        "interrupted at the start of an epoch",
        Break(6, "on_epoch_begin"),
        save_steps=6,
        logging_steps=4,
    ),
    _case(
        "edge_epoch_end",
        "interrupted at the end of an epoch, before its save",
        Break(12, "on_epoch_end"),
        max_steps=-1,
        num_train_epochs=3,
        save_strategy="epoch",
        eval_strategy="epoch",
    ),
    _case("part_epoch", "one and a half epochs", Break(8), max_steps=-1, num_train_epochs=1.5),
    _case("max_steps", "max_steps inside an epoch", Break(9), max_steps=10),
)


class _Noisy(Rows):
    """An evaluation that draws from all global generators."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index] + sum(noise() for noise in NOISES.values()), "labels": self.labels[index]}


def _random_evaluation(run: Attempt) -> Trainer:
    trainer = _train(run, eval_strategy="steps", eval_steps=3)
    trainer.eval_dataset = _Noisy(12)
    return trainer


def _two_evaluations(run: Attempt) -> Trainer:
    trainer = _train(run, eval_strategy="steps", eval_steps=3)
    trainer.eval_dataset = {"one": Rows(8, seed=5), "other": Rows(8, seed=6)}
    return trainer


EVALUATION = (
    Case("eval_random", "an evaluation on randomly augmented data", _random_evaluation),
    Case("eval_two_sets", "two evaluation sets", _two_evaluations),
    _case("eval_steps", "an evaluation at each save", eval_strategy="steps", eval_steps=4),
    _case("eval_odd", "evaluations that do not divide the saves", eval_strategy="steps", eval_steps=3),
    _case(
        "eval_between",
        "an evaluation between the save and the interruption",
        eval_strategy="steps",
        eval_steps=9,
        core=True,
    ),
    _case("eval_epoch", "an evaluation by epoch, saves by step", Break(9), eval_strategy="epoch"),
    _case("eval_epoch_inside", "interrupted in the first epoch", Break(5), eval_strategy="epoch", core=True),
    _case("eval_on_start", "eval_on_start", eval_on_start=True, eval_strategy="steps", eval_steps=5),
    _case("eval_delay", "eval_delay", eval_strategy="steps", eval_steps=2, eval_delay=5),
    _case(
        "eval_workers",
        "an evaluation with workers",
        eval_strategy="steps",
        eval_steps=5,
        dataloader_num_workers=1,
    ),
    _case(
        "break_in_eval",
        "interrupted inside an evaluation",
        Break(8, "on_prediction_step"),
        eval_strategy="steps",
        eval_steps=2,
    ),
    _case(
        "break_in_eval_at_save",
        "interrupted inside the evaluation that comes before a save",
        Break(8, "on_prediction_step", 2),
        eval_strategy="steps",
        eval_steps=4,
    ),
)

LOGGING = (
    _case("log_odd", "log rows that do not divide the saves", logging_steps=3, core=True),
    _case("log_each", "a log row at each step, also the first", logging_steps=1, logging_first_step=True),
    _case("log_sparse", "no log row before the first save", logging_steps=50),
    _case("log_epoch", "a log row by epoch", logging_strategy="epoch"),
    _case("log_no", "logging_strategy no", logging_strategy="no"),
    _case("log_no_eval", "the same with evaluations", logging_strategy="no", eval_strategy="steps", eval_steps=3),
    _case("tokens_seen", "include_num_input_tokens_seen", logging_steps=3, include_num_input_tokens_seen="all"),
)

SAVING = (
    Case("save_no", "save_strategy no, one save requested by a callback", _saved_by_hand),
    _case(
        "save_best",
        "save_strategy best",
        Break(11),
        save_strategy="best",
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    ),
    _case(
        "save_best_epoch",
        "save_strategy best, an evaluation by epoch",
        Break(17),
        save_strategy="best",
        eval_strategy="epoch",
        max_steps=-1,
        num_train_epochs=3,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
    ),
    _case("save_ratio", "save_steps as a fraction of the run", save_steps=0.25),
    _case("save_each", "a save at each step", Break(10, "on_step_end"), save_steps=1),
    _case("save_limit", "save_total_limit", Break(11), save_steps=2, save_total_limit=2),
    _case(
        "save_epoch_eval_steps",
        "saves by epoch, evaluations by step",
        Break(8),
        **EPOCHS,
        save_strategy="epoch",
        eval_strategy="steps",
        eval_steps=4,
    ),
    _case("break_after_save", "interrupted right after a save", Break(8, "on_save")),
    _case("break_at_step_end", "interrupted at the end of a step", Break(10, "on_step_end")),
    _case("break_before_optimizer", "interrupted before the optimizer's step", Break(10, "on_pre_optimizer_step")),
)

BREAKS = (
    _case("two_breaks", "interrupted twice", Break(5), Break(10), save_steps=3, core=True),
    _case(
        "three_breaks",
        "interrupted three times, once at the end of an epoch",
        Break(4),
        Break(7),
        Break(11),
        save_steps=3,
    ),
    _case("same_checkpoint_twice", "resumed twice from the same checkpoint", Break(6), Break(7)),
    Case("moved", "the directory was renamed", _train, resume=moved, core=True),
    Case("another_directory", "resumed by path into another directory", _train, resume=into_another_directory),
    Case("copied", "only the newest checkpoint was copied elsewhere", _train, resume=from_a_copy),
    _case("ended", "a finished run, resumed again", Break(0, "the end")),
    _case(
        "ended_epochs",
        "the same, with everything by epoch",
        Break(0, "the end"),
        **EPOCHS,
        save_strategy="epoch",
        eval_strategy="epoch",
        logging_strategy="epoch",
    ),
)

CASES = (*EDGE, *EVALUATION, *LOGGING, *SAVING, *BREAKS)
