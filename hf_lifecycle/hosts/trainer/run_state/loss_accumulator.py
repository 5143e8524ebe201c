"""What is logged of the whole run, in a resumed one too: the mean loss of the summary row, and running counts.

Trainer sums the loss since ``train()`` was called, in a number and, since the last log row, in a tensor. Both are
saved, and are given back on resume; so the mean does not depend on rows, which a trainer's ``log()`` may change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import counters, present_trainer, set_counters, unlogged_loss, within_evaluate
from hf_lifecycle.hosts.trainer.intercept import TOTAL_LOSS
from hf_lifecycle.hosts.trainer.run_state.position import Position

__all__ = ["LossAccumulator"]


class LossAccumulator(Component):
    """The sum that Trainer's ``_total_loss_scalar`` would hold had the run not been interrupted."""

    key = "losses"

    def __init__(self, position: Position) -> None:
        self._position = position
        self._trainer: Callable[[], Any] = lambda: None  # a weak reference: it outlives train() in an error's traceback
        self._unlogged_at_begin: torch.Tensor | None = None  # of the step in progress
        self._has_resumed = False
        self._unlogged = 0.0
        self._counters: dict[str, int | float] = {}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer()
        unlogged = self._unlogged_at_begin if self._position.mid_step else unlogged_loss(trainer)
        return {
            "unlogged": 0.0 if unlogged is None else float(unlogged),
            "counters": counters(trainer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "unlogged", "counters")
        self._unlogged = state["unlogged"]
        self._counters = state["counters"]

    def on_train_begin(self, event: Event) -> None:
        self._has_resumed = event.state.global_step > 0
        trainer = present_trainer()
        if trainer is not None:
            self._trainer = weakref.ref(trainer)
        set_counters(trainer, self._counters)
        unlogged = unlogged_loss(trainer) if self._unlogged != 0.0 else None
        if unlogged is not None:
            unlogged += self._unlogged

    def on_step_begin(self, event: Event) -> None:
        unlogged = unlogged_loss(self._trainer())
        self._unlogged_at_begin = None if unlogged is None else unlogged.clone()  # on its device: no step waits

    def on_log(self, event: Event) -> None:
        logs = event.more.get("logs")
        if not logs or "train_runtime" not in logs or "train_loss" not in logs or within_evaluate():
            return  # an evaluation of the training set has both names, too
        total = counters(self._trainer()).get(TOTAL_LOSS)
        if not self._has_resumed or total is None:
            return
        logs["train_loss"] = total / event.state.global_step
        if event.state.log_history and "train_runtime" in event.state.log_history[-1]:
            event.state.log_history[-1]["train_loss"] = logs["train_loss"]
