"""What saves cost, told to the tools that draw a run: TensorBoard, W&B and the like.

They are told in a row of its own, under ``lifecycle/``, by the ``on_log`` of transformers' integrations alone. Neither
``log_history`` nor other callbacks see it, so a run's log stays what it is without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["report"]

_INTEGRATIONS = "transformers.integrations."


def report(
    trainer: Any,
    rows: Sequence[Mapping[str, float]],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
) -> None:
    """Tell each row to each integration among the trainer's callbacks."""
    handler = trainer.callback_handler
    tools = [tool for tool in handler.callbacks if type(tool).__module__.startswith(_INTEGRATIONS)]
    for row in rows:
        for tool in tools:
            tool.on_log(args, state, control, logs=dict(row), model=handler.model)
