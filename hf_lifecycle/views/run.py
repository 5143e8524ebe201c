"""A run and a checkpoint on the disk as values that show themselves: in a notebook, in a terminal, and as data.

Promise: looking runs nothing that lies there and changes nothing. Every look reads anew, so what is shown is what is
there now. Nothing is kept open. The facts are those of the command line
(:mod:`hf_lifecycle.checkpoint.inspection.description`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from hf_lifecycle.argument_checks import read_path
from hf_lifecycle.checkpoint.directory.events import Event, read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.inspection.attempts import Attempt, attempts_of
from hf_lifecycle.checkpoint.inspection.description import (
    describe_checkpoint,
    describe_directory,
    is_checkpoint,
    quick_problems,
    read_trainer_state,
    timeline,
)
from hf_lifecycle.checkpoint.inspection.receipt import last_receipt_of, read_receipts
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.early_stopping_replay import Replay
from hf_lifecycle.errors import LifecycleError, MetricNotFound
from hf_lifecycle.views.html import checkpoint_page, run_page, run_sentence

__all__ = ["Checkpoint", "Run", "existing_directory", "training_page"]

_SETTINGS = frozenset(EarlyStopping(patience=None).settings)


class Run:
    """The checkpoints and the history of a run, from its output directory.

    In a notebook it shows itself: attempts, saves, resumes and stops over the steps, the early-stopping curve, and the
    checkpoints. ``print(run)`` prints the same as ``hf-lifecycle list``.

    Args:
        output_dir: The run's output directory.

    Raises:
        FileNotFoundError: There is none.
        NotADirectoryError: It is a file.
        ValueError: It is one checkpoint.
    """

    def __init__(self, output_dir: str | PathLike[str]) -> None:
        self.path = existing_directory(output_dir)
        if is_checkpoint(self.path):
            use = f"Checkpoint({str(output_dir)!r}) (hf-lifecycle show)"
            raise ValueError(f"{self.path} is one checkpoint; give its directory, or use {use}")

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Every checkpoint, newest first, intact or not."""
        return [Checkpoint(path) for _, path in checkpoints_in(self.path) if is_checkpoint(path)]

    @property
    def newest(self) -> Checkpoint | None:
        """The newest intact checkpoint, judged by presence and sizes."""
        return next((checkpoint for checkpoint in self.checkpoints if checkpoint.whole), None)

    @property
    def events(self) -> list[Event]:
        """What happened, oldest first."""
        return read_events(self.path)

    @property
    def attempts(self) -> list[Attempt]:
        """The calls of ``train()`` into this directory, oldest first."""
        return attempts_of(self.events)

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The rows that Trainer logged up to the newest intact checkpoint; empty if there is none."""
        newest = self.newest
        return [] if newest is None else newest.log_history

    def replay(self, **settings: Any) -> Replay:
        """The result of :meth:`EarlyStopping.replay` for the log of the run."""
        return EarlyStopping.replay(self.log_history, **settings)

    def report(self) -> dict[str, Any]:
        """Everything as plain data, as ``hf-lifecycle list --json`` prints it."""
        return describe_directory(self.path) | {"events": timeline(self.path), "receipt": self._receipt()}

    def _receipt(self) -> dict[str, Any] | None:
        return next(reversed(read_receipts(self.path)), None)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}): {run_sentence(describe_directory(self.path), self.attempts)}"

    def __str__(self) -> str:
        from hf_lifecycle.views.text import draw_directory  # rich takes a while to load

        return _as_text(draw_directory(self.report()))

    def _repr_html_(self) -> str:
        events, report = _events_in(self.path), describe_directory(self.path) | {"receipt": self._receipt()}
        return run_page(report, events, _curve_of_run(self.path / (report["newest"] or ""), report, events))


class Checkpoint:
    """One checkpoint: its progress and its content. It shows itself like a :class:`Run`.

    Args:
        path: Its directory, ``checkpoint-N``.

    Raises:
        FileNotFoundError: There is none.
        NotADirectoryError: It is a file.
        ValueError: It is no checkpoint.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self.path = existing_directory(path)
        inside = checkpoints_in(self.path)
        if inside and not is_checkpoint(self.path):
            use = f"Run({str(path)!r}) (hf-lifecycle list), or one of them, such as {inside[0][1]}"
            raise ValueError(f"{self.path} is a directory of checkpoints; use {use}")
        if not is_checkpoint(self.path):
            raise ValueError(f"{self.path} is no checkpoint: it has neither trainer_state.json nor lifecycle/")

    @property
    def problems(self) -> list[str]:
        """What is wrong with it, judged by presence and sizes; ``hf-lifecycle verify`` reads every byte."""
        return quick_problems(self.path)

    @property
    def whole(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    @property
    def log_history(self) -> list[dict[str, Any]]:
        """The rows that Trainer logged up to it; empty if it is not a checkpoint of Trainer.

        Raises:
            StateFileError: ``trainer_state.json`` is not a trainer state.
        """
        return _rows(self.path)

    def report(self) -> dict[str, Any]:
        """Everything as plain data, as ``hf-lifecycle show --json`` prints it."""
        found = describe_checkpoint(self.path)
        return found | {"receipt": last_receipt_of(self.path, found["attempt"])}

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        report = describe_checkpoint(self.path)
        metric = report["metric"]
        judged = "" if metric is None else f", {metric['name'] or 'best'} {metric['value']:.6g}"
        state = "intact" if report["whole"] else "damaged: " + "; ".join(report["problems"])
        return f"Checkpoint({str(self.path)!r}): step {report['step']}{judged}, {state}"

    def __str__(self) -> str:
        from hf_lifecycle.views.text import draw_checkpoint

        return _as_text(draw_checkpoint(self.report()))

    def _repr_html_(self) -> str:
        report, events = self.report(), _events_in(self.path.parent)
        curve = _curve_of_run(self.path, {"checkpoints": [report]}, events) if report["whole"] else None
        return checkpoint_page(report, curve)


def training_page(
    title: str, directory: Path, rows: Sequence[Mapping[str, Any]], metric: str, settings: Mapping[str, Any]
) -> str:
    """A training as its callback knows it: the run in its directory, and the curve up to now.

    Args:
        directory: The output directory; it need not be there yet.
        settings: The decision's, by argument name; none where nothing decides.
    """
    report, events = describe_directory(directory), _events_in(directory)
    return run_page(report, events, _curve(rows, metric, settings), title=title)


def _curve(rows: Sequence[Mapping[str, Any]], metric: str, settings: Mapping[str, Any]) -> Replay | None:
    """What the settings decide on a log; where they cannot be replayed, or are none, the metric without a decision."""
    undecided = {"patience": None, "check_finite": False, "mode": "min" if metric.endswith("loss") else "max"}
    for chosen in (settings, undecided) if settings else (undecided,):
        try:
            return EarlyStopping.replay(rows, metric=metric, **chosen)
        except (MetricNotFound, ValueError):
            continue
    return None


def _curve_of_run(checkpoint: Path, report: Mapping[str, Any], events: Sequence[Event]) -> Replay | None:
    """The curve with the settings that the log tells of; where it does not, of the metric without a decision."""
    try:
        rows = _rows(checkpoint)
    except (LifecycleError, OSError):
        return None
    if not rows:  # a custom training loop keeps no log
        return _judgements(events)
    facts = next((event.facts for event in reversed(events) if "monitor" in event.facts), {})
    names = [row["metric"]["name"] for row in report["checkpoints"] if row["metric"] is not None]
    metric = str(facts.get("monitor") or next(filter(None, names), "eval_loss"))
    return _curve(rows, metric, {name: value for name, value in facts.items() if name in _SETTINGS})


def _judgements(events: Sequence[Event]) -> Replay | None:
    """What checkpoints were judged by, without saying which is the better one: that is not known here."""
    judged: dict[int, float] = {}  # a resumed run comes to the same steps again
    for event in events:
        step, metric = event.facts.get("step"), event.facts.get("metric")
        if event.event == "committed" and isinstance(step, int) and isinstance(metric, float):
            judged[step] = metric
    rows = [{"metric": judged[step], "step": step} for step in sorted(judged)]
    return _curve(rows, "metric", {"patience": None, "start_after": len(rows)}) if rows else None


def _rows(checkpoint: Path) -> list[dict[str, Any]]:
    try:
        rows = read_trainer_state(checkpoint).get("log_history")
    except FileNotFoundError:
        return []
    return [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []


def _events_in(directory: Path) -> list[Event]:
    try:
        return read_events(directory)
    except OSError:
        return []


def existing_directory(path: str | PathLike[str]) -> Path:
    """``path``, which must be a directory.

    Raises:
        TypeError: It is no path.
        FileNotFoundError: There is none.
        NotADirectoryError: It is a file.
    """
    directory = Path(read_path("output_dir", path))
    if not directory.exists():
        raise FileNotFoundError(f"{directory}: there is no such directory")
    if not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file, not a directory")
    return directory


def _as_text(drawn: Any) -> str:
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80, highlight=False, color_system=None)
    with console.capture() as captured:
        console.print(drawn)
    return captured.get().rstrip("\n")
