"""Cases of early stopping and of the best model at the end."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from ..harness import Attempt, Break, Case
from .tiny import NOISES, Rows, regression

__all__ = ["CASES"]

BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
}


class _Scripted(TrainerCallback):
    """Sets the metric of each evaluation, so that a case decides when a run stops improving."""

    def __init__(self, *metrics: float) -> None:
        self.metrics = metrics

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        index = state.global_step // int(args.eval_steps) - 1
        metrics["eval_loss"] = state.log_history[-1]["eval_loss"] = self.metrics[index]


def _stopping(
    run: Attempt,
    *metrics: float,
    patience: int = 3,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    stock = EarlyStoppingCallback(early_stopping_patience=patience)
    if run.arm == "stock":
        run.watch("stopping", lambda: {"counter": stock.early_stopping_patience_counter})
        callbacks = run.callbacks(stock)
    else:
        from hf_lifecycle import EarlyStopping

        stopping = run.watch("stopping", EarlyStopping(patience=patience, **(options or {})))
        callbacks = run.callbacks(early_stopping=stopping, monitor="eval_loss")
    return regression(
        run,
        train=Rows(48, noise=NOISES["torch"]),
        callbacks=[_Scripted(*metrics), *callbacks],
        **{"max_steps": 24, "eval_steps": 2, **BEST, **settings},
    )


def _falling_then_flat(run: Attempt, **settings: Any) -> Trainer:
    return _stopping(run, 0.9, 0.5, 0.8, 0.7, 0.6, 0.55, 0.55, 0.55, 0.55, 0.55, 0.55, 0.55, patience=5, **settings)


def _by_patience(run: Attempt) -> Trainer:
    """Stops at step 10."""
    stock = EarlyStoppingCallback(early_stopping_patience=3)
    scripted = _Scripted(0.9, 0.5, 0.8, 0.7, 0.6, 0.6)
    return regression(run, callbacks=[scripted, *run.callbacks(stock, patience=3)], eval_steps=2, **BEST)


def _best(run: Attempt, **settings: Any) -> Trainer:
    return regression(
        run, **{**BEST, "eval_steps": 4, "load_best_model_at_end": True, "learning_rate": 0.3, **settings}
    )


def _restoring(run: Attempt) -> Trainer:
    if run.arm == "stock":
        return _falling_then_flat(run, load_best_model_at_end=True, save_steps=2)
    return _falling_then_flat(run, options={"restore_best": True})


CASES = (
    Case("restore_best", "EarlyStopping(restore_best=True)", _restoring, breaks=(Break(11),)),
    Case(
        "stopping_in_steps",
        "patience counted in steps (stock: in evaluations)",
        lambda run: _falling_then_flat(run, options={"patience_unit": "steps", "min_delta": 0.01}),
        breaks=(Break(6),),
    ),
    Case(
        "stopping_counter",
        "early stopping's counter over a resume",
        _falling_then_flat,
        breaks=(Break(10),),
        core=True,
    ),
    Case(
        "stopping_counter_two_breaks",
        "the same over two resumes",
        _falling_then_flat,
        breaks=(Break(9), Break(13)),
    ),
    Case("stopping_patience", "LifecycleCallback(patience=3)", _by_patience, breaks=(Break(9),)),
    Case(
        "stopping_ended",
        "a run that early stopping ended at a save, resumed again",
        lambda run: _stopping(run, *[0.5, 0.9, 0.9, 0.9] + [0.9] * 8),
        breaks=(Break(0, "the end"),),
    ),
    Case(
        "stopping_ended_between",
        "the same, between two saves",
        lambda run: _stopping(run, *[0.5, 0.9, 0.9, 0.9] + [0.9] * 8, save_steps=3),
        breaks=(Break(0, "the end"),),
    ),
    Case(
        "stopping_with_best",
        "early stopping with the best model at the end",
        lambda run: _falling_then_flat(run, load_best_model_at_end=True, save_steps=2),
        breaks=(Break(11),),
    ),
    Case("best_at_end", "load_best_model_at_end", _best, core=True),
    Case(
        "best_at_end_limit",
        "the same, with save_total_limit=1",
        lambda run: _best(run, save_total_limit=1),
    ),
    Case(
        "best_at_end_epoch",
        "the same, by epoch",
        lambda run: _best(run, eval_strategy="epoch", save_strategy="epoch", max_steps=-1, num_train_epochs=3),
        breaks=(Break(9),),
    ),
    Case(
        "best_at_end_broken_in_eval",
        "the same, interrupted inside an evaluation",
        _best,
        breaks=(Break(8, "on_prediction_step"),),
    ),
)
