"""Early stopping on the log of a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from hf_lifecycle.checkpoint.inspection.description import is_checkpoint, read_trainer_state
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.errors import NoUsableCheckpoint
from hf_lifecycle.views.run import Run

__all__ = ["replay"]


def replay(
    path: Path,
    plot: Path | None,
    *,
    patience: float,
    min_delta: float,
    metric: str,
    mode: Literal["min", "max"] | None,
) -> dict[str, Any]:
    """Replay the newest log below ``path``, and draw it into ``plot`` if that is given.

    Raises:
        FileNotFoundError: There is no log.
        MetricNotFound: It does not have the metric.
        NoUsableCheckpoint: Every checkpoint is damaged.
        StateFileError: The log is no trainer state.
        ValueError: A setting is not what it should be.
        ImportError: matplotlib is not installed.
    """
    history = _history(path)
    if history.is_dir():
        read_trainer_state(history)  # refuses what is no file before it is opened
    chosen: Literal["min", "max"] = mode or ("min" if metric.endswith("loss") else "max")
    found = EarlyStopping.replay(history, metric=metric, patience=patience, min_delta=min_delta, mode=chosen)
    if plot is not None:
        found.plot().savefig(plot)
    kept = ("metric", "stopped_at", "epoch", "reason", "best_metric", "best_step", "evaluations", "saved_steps")
    return {
        "history": str(history),
        "mode": chosen,
        "patience": patience,
        "min_delta": min_delta,
        **{name: getattr(found, name) for name in kept},
        "logged_evaluations": len(found.steps),
        "last_step": found.steps[-1],
        "missed": None if found.missed is None else dict(zip(("step", "value"), found.missed, strict=True)),
        "plot": None if plot is None else str(plot),
    }


def _history(path: Path) -> Path:
    """A file or a checkpoint as it is; of a directory of checkpoints the newest that is whole."""
    if not path.is_dir() or is_checkpoint(path):
        return path
    run = Run(path)
    if run.newest is not None:
        return run.newest.path
    problems = [problem for checkpoint in run.checkpoints for problem in checkpoint.problems]
    raise NoUsableCheckpoint(path, problems) if problems else FileNotFoundError(f"{path}: no checkpoints here")
