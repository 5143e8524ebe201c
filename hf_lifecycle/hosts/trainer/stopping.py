"""Early stopping under Trainer: which metric is watched, when it is asked, and what stopping means.

The decision itself is :class:`hf_lifecycle.early_stopping.EarlyStopping`. ``load_best_model_at_end`` is not needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.errors import MetricNotFound, UnsupportedTraining
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.method_patching import borrow, give_back
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Stopping", "default_mode", "default_monitor"]

logger = logging.getLogger(__name__)


def _with_prefix(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"


def default_monitor(args: TrainingArguments) -> str:
    """``metric_for_best_model`` with Trainer's ``eval_`` before it, else ``eval_loss``."""
    return _with_prefix(args.metric_for_best_model or "loss")


def default_mode(args: TrainingArguments, monitor: str) -> str:
    """``greater_is_better`` where it speaks of this metric, else Trainer's rule: min for a name that ends in loss."""
    speaks_of_it = args.metric_for_best_model is not None and default_monitor(args) == _with_prefix(monitor)
    if args.greater_is_better is not None and speaks_of_it:
        return "max" if args.greater_is_better else "min"
    return "min" if monitor.endswith("loss") else "max"


class Stopping(Component):
    """Asks the decision after each evaluation.

    Args:
        decision: The decision, or None for no early stopping.
        monitor: The metric's name, with or without ``eval_``; None for :func:`default_monitor`.
    """

    key = "early_stopping"

    def __init__(self, decision: EarlyStopping | None, monitor: str | None, ranks: Ranks) -> None:
        self._ranks = ranks
        self.decision = decision
        self._monitor = monitor
        self._seen: set[str] = set()
        self._found = False
        self._missed: list[tuple[int, float]] = []  # the step and the progress of each evaluation without the metric
        self._active = False
        self._seconds_before = 0.0
        self._began = 0.0

    @property
    def stopped(self) -> bool:
        """Whether the decision has been to stop."""
        return self.decision is not None and self.decision.should_stop

    @property
    def restores_best(self) -> bool:
        """Whether the best weights are to be put back at the end."""
        return self.decision is not None and self.decision.restore_best

    def state_dict(self) -> dict[str, Any]:
        if self.decision is None:
            return {"decision": None, "seconds": 0.0}
        # The clock is part of the state only where patience is counted by it; elsewhere equal runs have equal states.
        seconds = self._seconds() if self.decision.patience_unit == "seconds" else 0.0
        return {"decision": self.decision.state_dict(), "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "decision", "seconds")
        if self.decision is None or state["decision"] is None:
            return
        self.decision.load_state_dict(state["decision"])
        self._seconds_before = state["seconds"]

    def on_train_begin(self, event: Event) -> None:
        self._active = True
        self._began = time.monotonic()
        if self.decision is None:
            return
        if event.args.eval_strategy == IntervalStrategy.NO:
            raise UnsupportedTraining(
                ["early stopping needs evaluations, but eval_strategy is 'no'"], 'set eval_strategy="steps" or "epoch"'
            )
        if self._monitor is None:
            self._monitor = default_monitor(event.args)
        if self.restores_best:
            self._prepare_restore(event.args)

    def _prepare_restore(self, args: TrainingArguments) -> None:
        if args.save_strategy == SaveStrategy.NO:
            raise UnsupportedTraining(
                ["restore_best needs checkpoints, but save_strategy is 'no'"], 'set save_strategy="steps" or "epoch"'
            )
        self._refuse_another_best(args)
        self._let_trainer_load_best(args)

    def _let_trainer_load_best(self, args: TrainingArguments) -> None:
        # Trainer reads this when training is over. It is lent between epochs only: no new Trainer can be made of
        # arguments that a broken training left so, without metric_for_best_model.
        if self.restores_best:
            borrow(args, "load_best_model_at_end", True)

    def on_epoch_begin(self, event: Event) -> None:
        give_back(event.args, "load_best_model_at_end")

    def _refuse_another_best(self, args: TrainingArguments) -> None:
        """Trainer loads the best by ``metric_for_best_model`` where there is one; it has to be ours."""
        assert self.decision is not None
        assert self._monitor is not None
        if args.metric_for_best_model is None:
            return
        theirs = default_monitor(args)
        ours, kept = (_with_prefix(self._monitor), self.decision.mode), (theirs, default_mode(args, theirs))
        if ours != kept:
            raise UnsupportedTraining(
                [
                    f"restore_best needs the {ours[1]} of {ours[0]!r}, but with metric_for_best_model and "
                    f"greater_is_better Trainer keeps the {kept[1]} of {kept[0]!r}"
                ],
                "leave out metric_for_best_model, or use the same metric and mode for both",
            )

    def on_evaluate(self, event: Event) -> None:
        metrics = event.more.get("metrics")
        if not self._active or metrics is None or not self._is_meant(metrics):
            return
        seconds = self._share(metrics)
        if self.decision is None:
            return
        assert self._monitor is not None
        name = self._monitor if self._monitor in metrics else f"eval_{self._monitor}"
        progress = self._progress(event.args, event.state, seconds)
        self._seen |= set(metrics)
        if name not in metrics:  # another of several evaluation sets may have it
            if not self._missed or self._missed[-1][0] != event.state.global_step:
                self._missed.append((event.state.global_step, progress))
            return
        self._found = True
        had_stopped = self.stopped
        stop = self.decision.step(metrics[name], progress=progress)
        if self.decision.improved and not had_stopped and self.restores_best:
            self._keep_best(event.args, event.state, event.control, float(metrics[name]))
        if stop:
            event.control.should_training_stop = True
            logger.info("early stopping at step %d: %s", event.state.global_step, self.decision.reason)

    def _is_meant(self, metrics: Mapping[str, Any]) -> bool:
        """Whether it is an evaluation of Trainer's; one with another prefix, such as ``train``, is somebody else's."""
        return self._monitor in metrics or any(name.startswith("eval_") for name in metrics)

    def _share(self, metrics: dict[str, Any]) -> float:
        """Let every rank judge by what rank 0 measured: by its metrics, which it is given, and by its clock.

        Trainer goes by the same dict: for the best weights, ``save_strategy="best"``, a schedule that awaits a plateau.
        """
        seconds = self._seconds()
        if self._ranks.world_size == 1:
            return seconds
        own = {name: value for name, value in metrics.items() if type(value) in (int, float)}
        told = self._ranks.broadcast([own, seconds], what="the metrics of an evaluation")
        for name in own.keys() - told[0].keys():
            del metrics[name]
        metrics.update(told[0])
        return float(told[1])

    def _keep_best(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metric: float) -> None:
        if args.metric_for_best_model is None:  # else Trainer keeps these itself
            state.best_metric, state.best_global_step = metric, state.global_step
        control.should_save = True

    def _progress(self, args: TrainingArguments, state: TrainerState, seconds: float) -> float:
        assert self.decision is not None
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        return {
            "evaluations": float(state.global_step),
            "steps": float(state.global_step),
            "samples": float(state.global_step * per_step),
            "seconds": seconds,
        }[self.decision.patience_unit]

    def _seconds(self) -> float:
        return self._seconds_before + (time.monotonic() - self._began)

    def on_save(self, event: Event) -> None:
        self._check_seen()

    def on_step_begin(self, event: Event) -> None:
        self._check_seen()

    def on_epoch_end(self, event: Event) -> None:
        self._check_seen()
        self._let_trainer_load_best(event.args)

    def on_train_end(self, event: Event) -> None:
        self._check_seen(ends=True)
        is_over = event.state.global_step >= event.state.max_steps  # else it was interrupted, and is resumed later
        if is_over and self.decision is not None and self.decision.evaluations == 0:
            logger.warning(
                "early stopping had no effect: no evaluation reported %s before training ended at step %d; evaluate "
                "more often (eval_strategy, eval_steps)",
                self._monitor,
                event.state.global_step,
            )

    def release(self, args: TrainingArguments) -> None:
        self._active = False
        give_back(args, "load_best_model_at_end")

    def _check_seen(self, *, ends: bool = False) -> None:
        """Raise where the metric never came: for as long as patience, or until training ``ends``."""
        if self._found or not self._missed:
            return
        assert self._monitor is not None
        assert self.decision is not None
        by_count = self.decision.patience_unit == "evaluations"
        waited = len(self._missed) if by_count else self._missed[-1][1] - self._missed[0][1]
        if ends or (self.decision.patience is not None and waited >= self.decision.patience):
            raise MetricNotFound(self._monitor, sorted(self._seen))
