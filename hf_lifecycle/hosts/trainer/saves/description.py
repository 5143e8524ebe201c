"""What the manifest of a checkpoint under Trainer says beside its files."""

from __future__ import annotations

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.directory.manifest import Manifest, Metric
from hf_lifecycle.hosts.trainer.stopping import default_monitor

__all__ = ["describe"]


def describe(args: TrainingArguments, state: TrainerState, *, attempt: str, monitor: str | None) -> Manifest:
    """What the manifest of the checkpoint that is being saved says, but for its files.

    Args:
        args: Trainer's arguments.
        state: Trainer's state at the save.
        attempt: The call of ``train()`` that saves it.
        monitor: The metric that it is judged by, with or without ``eval_``; None for
            :func:`~hf_lifecycle.hosts.trainer.stopping.default_monitor`.
    """
    return Manifest(
        attempt=attempt,
        step=state.global_step,
        epoch=float(state.epoch),
        world_size=args.world_size,
        created="",
        metric=_metric(state, monitor or default_monitor(args)),
        files=(),
    )


def _metric(state: TrainerState, monitor: str) -> Metric | None:
    """The metric of these very weights: what was evaluated at another step says nothing of them."""
    for row in reversed(state.log_history):
        if row.get("step") != state.global_step:
            break
        for name in (monitor, f"eval_{monitor}"):
            if isinstance(row.get(name), (int, float)):
                return Metric(name, float(row[name]))
    return None
