"""What is logged of the whole run, in a resumed one too: the mean loss of the summary row, and running counts.

Trainer sums the loss since ``train()`` was called. Each log row is that sum's next part divided by a number of steps,
and the parts are float32, so they can be had back exactly from the rows and summed in Trainer's own order. What was
not logged when a checkpoint was saved (``logging_strategy="no"``) is saved, and added to Trainer's own sum on resume.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from packaging.version import Version
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.trainer.host import counters, present_trainer, set_counters, unlogged_loss
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.position import Position

__all__ = ["RunningLoss"]

# From this version on, train_loss is the mean over the steps of this call; before, over global_step.
_MEAN_OVER_THIS_CALL = Version(transformers.__version__) >= Version("5.19")


class RunningLoss(Part):
    """The sum that Trainer's ``_total_loss_scalar`` would hold had the run not been broken off."""

    key = "losses"

    def __init__(self, position: Position) -> None:
        self._position = position
        self._trainer: Callable[[], Any] = lambda: None  # a weak reference: it outlives train() in an error's traceback
        self._unlogged_at_begin: torch.Tensor | None = None  # of the step in progress
        self._total = 0.0
        self._total_of_call = 0.0
        self._logged_step = 0
        self._first_step = 0
        self._first_unlogged_step = 0
        self._unlogged = 0.0
        self._counters: dict[str, int | float] = {}

    def state_dict(self) -> dict[str, Any]:
        trainer = self._trainer()
        unlogged = self._unlogged_at_begin if self._position.mid_step else unlogged_loss(trainer)
        return {
            "total": self._total,
            "logged_step": self._logged_step,
            "unlogged": 0.0 if unlogged is None else float(unlogged),
            "counters": counters(trainer),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "total", "logged_step", "unlogged", "counters")
        self._total, self._logged_step = state["total"], state["logged_step"]
        self._unlogged = state["unlogged"]
        self._counters = state["counters"]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first_step = state.global_step
        self._first_unlogged_step = int(self._counters.get("_globalstep_last_logged", state.global_step))
        trainer = present_trainer()
        if trainer is not None:
            self._trainer = weakref.ref(trainer)
        set_counters(trainer, self._counters)
        unlogged = unlogged_loss(trainer) if self._unlogged != 0.0 else None
        if unlogged is not None:
            unlogged += self._unlogged

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        unlogged = unlogged_loss(self._trainer())
        self._unlogged_at_begin = None if unlogged is None else unlogged.clone()  # on its device: no step waits

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs:
            return
        if "train_runtime" in logs and "train_loss" in logs:
            self._summarise(state, logs)
        elif "loss" in logs and state.global_step > self._logged_step:
            since = max(self._logged_step, self._first_unlogged_step)
            part = float(np.float32(logs["loss"] * (state.global_step - since)))
            self._total += part
            self._total_of_call += part
            self._logged_step = state.global_step

    def _summarise(self, state: TrainerState, logs: dict[str, Any]) -> None:
        if self._first_step == 0:
            return
        tail = 0.0
        if self._logged_step < state.global_step:
            steps = state.global_step - (self._first_step if _MEAN_OVER_THIS_CALL else 0)
            tail = float(np.float32(logs["train_loss"] * steps - self._total_of_call))
        logs["train_loss"] = (self._total + tail) / state.global_step
        if state.log_history and "train_runtime" in state.log_history[-1]:
            state.log_history[-1]["train_loss"] = logs["train_loss"]
