"""When other early-stopping settings would have ended a run that is over, read from its log.

Promise: the answer is the one that :class:`~hf_lifecycle.early_stopping.EarlyStopping` itself gives for the logged
metrics. Not promised: that a run which had stopped elsewhere would otherwise have been the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lifecycle.argument_checks import read_finite, read_name, read_number
from hf_lifecycle.early_stopping_outcome import ReplayRecord
from hf_lifecycle.errors import MetricNotFound, StateFileError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["MAX_BYTES", "Replay", "replay"]

MAX_BYTES = 256 * 2**20
"""The largest file that is read: a log of this size is some million rows."""

# Columns of a log row that are no metric one could watch.
_NO_METRICS = frozenset({"step", "epoch"})


class Replay(ReplayRecord):
    """What early stopping would have done to a run; it draws itself."""

    __slots__ = ()

    def plot(self) -> Figure:
        """Draw the metric, the best so far, the band of ``min_delta`` and the stop.

        Raises:
            ImportError: matplotlib is not installed; the message says how to.
        """
        # An import upwards, made only when a picture is asked for: deciding needs no view.
        from hf_lifecycle.views.plots import plot_replay

        return plot_replay(self)

    def _repr_html_(self) -> str:
        """The same in a notebook, drawn without matplotlib."""
        from hf_lifecycle.views.html import replay_page

        return replay_page(self)


def replay(
    history: str | PathLike[str] | Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    metric: str,
    progress: str | None,
    stopping: Any,
) -> Replay:
    """Let ``stopping``, a fresh ``EarlyStopping``, decide on every evaluation in ``history``; see its ``replay``."""
    read_name("metric", metric)
    if progress is not None:
        read_name("progress", progress)
    else:
        if stopping.patience_unit in ("samples", "seconds"):
            raise ValueError(
                f"progress must name the column of the log that holds the {stopping.patience_unit}: Trainer logs none"
            )
        progress = "step"
    if isinstance(history, (str, PathLike)):
        path = _state_path(Path(history))
        try:
            return _replay_rows(_rows(_read_json(path)), metric, progress, stopping)
        except MetricNotFound:
            raise
        except ValueError as error:
            raise StateFileError(path, str(error)) from error
    return _replay_rows(_rows(history), metric, progress, stopping)


def _state_path(path: Path) -> Path:
    if not path.is_dir():
        return path
    inside = path / "trainer_state.json"
    if not inside.exists():
        raise FileNotFoundError(f"{inside}: there is none; pass a checkpoint directory (checkpoint-N) or the file")
    return inside


def _read_json(path: Path) -> Any:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise StateFileError(path, f"it is larger than {MAX_BYTES} bytes, which no trainer state is")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise StateFileError(path, f"it is not valid JSON ({error})") from error


def _rows(history: Any) -> list[Mapping[str, Any]]:
    if isinstance(history, Mapping):
        if "log_history" not in history:
            raise ValueError("history has no log_history; pass a log_history or a trainer state")
        history = history["log_history"]
    if not isinstance(history, (list, tuple)) or not all(isinstance(row, Mapping) for row in history):
        raise ValueError("history must be a log_history, which is a list of dicts, or a trainer state that holds one")
    return list(history)


def _replay_rows(rows: Sequence[Mapping[str, Any]], metric: str, progress: str, stopping: Any) -> Replay:
    logged = {str(name) for row in rows for name in row}
    # As metric_for_best_model: the name may be given without its prefix.
    name = next((name for name in (metric, f"eval_{metric}") if name in logged), None)
    if name is None:
        raise MetricNotFound(metric, sorted(logged - _NO_METRICS), "ask for one of these as the metric")
    evaluations = [(index, row) for index, row in enumerate(rows) if name in row]
    steps, values, bests, targets = [], [], [], []
    best_step = stopped_at = epoch = None
    for index, row in evaluations:
        value = float(read_number(f"{name} in row {index}", row[name]))
        steps.append(int(_cell(row, "step", index, whole=True)))
        values.append(value)
        if not stopping.should_stop:
            if stopping.step(value, progress=_cell(row, progress, index)):
                stopped_at, epoch = steps[-1], row.get("epoch")
            if stopping.improved:
                best_step = steps[-1]
        bests.append(stopping.best_metric)
        targets.append(stopping.to_beat)
    return Replay(
        metric=name,
        settings=stopping.settings,
        stopped_at=stopped_at,
        epoch=None if epoch is None else float(read_number("epoch", epoch)),
        reason=stopping.reason,
        best_metric=stopping.best_metric,
        best_step=best_step,
        evaluations=stopping.evaluations,
        steps=tuple(steps),
        values=tuple(values),
        bests=tuple(bests),
        targets=tuple(targets),
    )


def _cell(row: Mapping[str, Any], column: str, index: int, *, whole: bool = False) -> float:
    if column not in row:
        raise ValueError(f"row {index} of the log has no {column!r}, only {sorted(map(str, row))}")
    return read_finite(f"{column} in row {index}", row[column], minimum=0, whole=whole)
