"""A hyperparameter search with the callback runs as without it, and what the callback leaves alone is said."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer.runs import Net, Rows, digests, new_trainer, saved_run
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.state.fingerprint import tensor_digest

optuna = pytest.importorskip("optuna")


def net() -> Net:
    torch.manual_seed(7)
    return Net()


class Watches(TrainerCallback):
    """What each trial ended with, and the learning rate and early stopping that it had."""

    def __init__(self, callback: LifecycleCallback | None) -> None:
        self.callback = callback
        self.ends: list[tuple[int, float, dict[str, str]]] = []
        self.evaluations: list[int] = []

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        weights = {name: tensor_digest(value) for name, value in model.state_dict().items()}
        self.ends.append((state.global_step, args.learning_rate, weights))
        if self.callback is not None and self.callback.early_stopping is not None:
            self.evaluations.append(self.callback.early_stopping.evaluations)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    given = {"max_steps": 8, "save_steps": 2, "save_total_limit": 2, "eval_strategy": "steps", "eval_steps": 2}
    given |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-3}
    return TrainingArguments(str(folder), **{**given, **settings})


def search(folder: Path, callback: LifecycleCallback) -> tuple[Trainer, Watches, Any]:
    watches = Watches(callback)
    trainer = Trainer(
        model_init=net,
        args=arguments(folder),
        train_dataset=Rows(),
        eval_dataset=Rows(6, seed=2),
        callbacks=[callback, watches],
    )
    best = trainer.hyperparameter_search(
        backend="optuna",
        n_trials=3,
        direction="minimize",
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-3, 1e-1])},
        sampler=optuna.samplers.GridSampler({"learning_rate": [1e-3, 1e-1]}),
    )
    return trainer, watches, best


@pytest.mark.slow
def test_each_trial_of_a_search_ends_as_it_would_by_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_lifecycle")
    trainer, watches, best = search(tmp_path / "search", LifecycleCallback(patience=9))
    said = [record for record in caplog.records if record.name.startswith("hf_lifecycle")]
    assert [record.levelname for record in said] == ["INFO", "INFO"]
    assert all(record.getMessage().startswith("hyperparameter search: ") for record in said)
    assert len(watches.ends) == 2
    for steps, rate, weights in watches.ends:
        alone = Watches(None)
        Trainer(
            model_init=net,
            args=arguments(tmp_path / str(rate), learning_rate=rate),
            train_dataset=Rows(),
            eval_dataset=Rows(6, seed=2),
            callbacks=[LifecycleCallback(), alone],
        ).train()
        assert alone.ends == [(steps, rate, weights)]
    assert watches.evaluations == [4, 4], "early stopping begins anew with each trial"
    assert best.run_id in ("0", "1")
    # Trainer's own folders and retention, the arguments as they were, and nothing else.
    kept = sorted(str(path.relative_to(tmp_path / "search")) for path in (tmp_path / "search").glob("run-*/*"))
    assert kept == [f"run-{run}/checkpoint-{step}" for run in (0, 1) for step in (6, 8)]
    assert trainer.args.save_total_limit == 2
    assert trainer.args.output_dir == str(tmp_path / "search")


@pytest.mark.slow
def test_a_training_after_a_search_saves_and_resumes_exactly(tmp_path: Path) -> None:
    search(tmp_path / "run", LifecycleCallback())
    saved_run(tmp_path / "run", max_steps=6)
    resumed = new_trainer(tmp_path / "run", LifecycleCallback())
    resumed.train(resume_from_checkpoint=latest_checkpoint(tmp_path / "run"))
    whole = new_trainer(tmp_path / "whole", LifecycleCallback())
    whole.train()
    assert digests(resumed) == digests(whole)


class Pruning(TrainerCallback):
    """Reports to the trial of a study, which it holds with its storage, and ends it."""

    def __init__(self, trial: Any) -> None:
        self.trial = trial

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.trial.report(metrics["eval_loss"], state.global_step)
        if self.trial.should_prune():
            raise optuna.TrialPruned


@pytest.mark.slow
def test_trial_that_a_callback_holds_is_left_to_its_study(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def objective(trial: Any) -> float:
        settings = arguments(tmp_path / str(trial.number), learning_rate=trial.suggest_float("rate", 1e-4, 1e-1))
        own: list[TrainerCallback] = [Pruning(trial), LifecycleCallback()]
        trainer = Trainer(net(), settings, train_dataset=Rows(), eval_dataset=Rows(6, seed=2), callbacks=own)
        trainer.train()
        return float(trainer.evaluate()["eval_loss"])

    storage = f"sqlite:///{tmp_path}/study.db"
    pruner = optuna.pruners.PercentilePruner(0.0, n_startup_trials=1)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler(seed=1), pruner=pruner)
    study.optimize(objective, n_trials=3)
    assert {trial.state.name for trial in study.trials} == {"COMPLETE", "PRUNED"}
    assert not [one for one in caplog.records if one.name.startswith("hf_lifecycle")]
