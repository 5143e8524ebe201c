"""Records a training under Trainer: every batch, what it ended with and, where asked for, what each step came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle.state.fingerprint import local_part, module_tensors
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.rng import capture_rng
from hf_lifecycle.testing.outcome import WALL_CLOCK, Outcome, digest, flatten

__all__ = ["Recorder", "keep", "read"]


def read(thing: Any) -> Any:
    """The state of an object that has one, what a function returns, or the value itself."""
    if hasattr(thing, "state_dict"):
        return thing.state_dict()
    return thing() if callable(thing) else thing


def keep(tree: Any) -> dict[str, Any]:
    """The leaves of ``tree`` as they are now: tensors go on changing after a training, these do not."""
    return {
        path: local_part(value).detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for path, value in flatten(tree)
    }


@dataclass
class Recorder(TrainerCallback):
    """Records a run: :meth:`attach` it to the trainer after all other callbacks.

    Args:
        trainer: The trainer; its ``training_step`` is wrapped.
        watched: More things whose state counts, by name: objects with ``state_dict()``, or functions without arguments.
        with_trail: Whether to digest random numbers, losses and weights at every step.
    """

    trainer: Trainer
    watched: Mapping[str, Any] = field(default_factory=dict)
    with_trail: bool = False
    started_at: int = -1
    batches: dict[tuple[int, int], str] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    trail: dict[int, dict[str, str]] = field(default_factory=dict)

    def attach(self) -> None:
        """Listen to the trainer."""
        training_step = self.trainer.training_step
        micro = {"step": -1, "index": 0}

        def recording_step(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            step = self.trainer.state.global_step
            micro.update(step=step, index=micro["index"] + 1 if step == micro["step"] else 0)
            self.batches[step, micro["index"]] = digest(dict(inputs))
            self._note(step + 1, f"random numbers{_at(micro['index'])}", lambda: capture_rng().state_dict())
            self._note(step + 1, f"batches{_at(micro['index'])}", lambda: self.batches[step, micro["index"]])
            loss = training_step(model, inputs, *args, **kwargs)
            self._note(step + 1, f"loss{_at(micro['index'])}", lambda: loss)
            return loss

        self.trainer.training_step = recording_step  # type: ignore[method-assign]
        self.trainer.add_callback(self)

    def _note(self, step: int, kind: str, tree: Any) -> None:
        if self.with_trail:
            self.trail.setdefault(step, {})[kind] = digest(tree())

    def _note_weights(self, step: int) -> None:
        model: Any = self.trainer.model
        self._note(step, "weights", lambda: module_tensors(unwrapped(model)))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.started_at = state.global_step
        self._note_weights(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._note_weights(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        trainer: Any = self.trainer
        scaler = trainer.accelerator.scaler
        best = state.best_model_checkpoint
        self.parts = {
            "weights": keep(trainer.model.state_dict()),
            "optimizer": keep(trainer.optimizer.state_dict()),
            "scheduler": keep(trainer.lr_scheduler.state_dict()),
            "scaler": keep(scaler.state_dict() if scaler is not None else {}),
            "rng": keep(capture_rng().state_dict()),
            "stopping": keep({name: read(thing) for name, thing in self.watched.items()}),
            "progress": {
                "global_step": state.global_step,
                "epoch": state.epoch,
                "best_metric": state.best_metric,
                "best_checkpoint": Path(best).name if best is not None else None,
            },
        }

    def outcome(self) -> Outcome:
        """What was recorded. The run must have come to its end."""
        assert self.parts, "training did not end"
        rows = [
            {key: value for key, value in row.items() if not key.endswith(WALL_CLOCK)}
            for row in self.trainer.state.log_history
        ]
        return Outcome(self.started_at, self.parts, rows, dict(self.batches), self.trail)


def _at(micro_batch: int) -> str:
    return f" of micro-batch {micro_batch + 1}" if micro_batch else ""
