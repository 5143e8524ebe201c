"""Adapters that are merged into their weights only while a checkpoint is saved.

A checkpoint of that moment has the merged weights, and that they are. The run that saved it unmerges them before its
next step, by which weights are rounded; a resumed run does the same, and continues with the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.state.modules import modules_of
from hf_lifecycle.state.proof import unwrapped

__all__ = ["AdapterMerging"]


class AdapterMerging(Component):
    """Follows which layers of PEFT's are merged.

    Attributes:
        only_for_save: Whether some are at the last save, and none was when its step began.
    """

    key = "merging"

    def __init__(self) -> None:
        self.only_for_save = False
        self._layers: list[Any] = []
        self._at_step = False
        self._unmerges = False

    def on_train_begin(self, event: Event) -> None:
        trainer = present_trainer()
        if trainer is not None and getattr(unwrapped(trainer.model), "peft_config", None):
            modules = (one for _, one in modules_of(unwrapped(trainer.model)))
            self._layers = [one for one in modules if isinstance(vars(one).get("merged_adapters"), list)]

    def _are_merged(self) -> bool:
        return any(one.merged_adapters for one in self._layers)

    def state_dict(self) -> dict[str, Any]:
        return {"only_for_save": self.only_for_save}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "only_for_save")
        self._unmerges = bool(state["only_for_save"])

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self.only_for_save = self._are_merged() and not self._at_step

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._unmerges:  # what is restored, is by now
            self._unmerges = False
            for one in self._layers:
                if one.merged_adapters:
                    one.unmerge()
        self._at_step = self._are_merged()

    def release(self, args: TrainingArguments) -> None:
        self._layers = []
