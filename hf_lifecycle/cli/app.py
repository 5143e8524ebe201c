"""``hf-lifecycle``: doctor, list, show, verify, accept, diff, prune and replay the checkpoints of a run.

Every command takes ``--json``. Exit codes: 0 good, 1 bad or different, 2 wrong use.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_lifecycle.checkpoint.directory.retention import (
    AnyOf,
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
    RetentionPolicy,
)
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.inspection.description import is_checkpoint, read_trainer_state
from hf_lifecycle.cli import drawing
from hf_lifecycle.cli.accepting import accept_edits
from hf_lifecycle.cli.diagnosis import diagnose, draw_checkpoint_here, draw_diagnosis, with_place
from hf_lifecycle.cli.output import BAD, GOOD, answers, report
from hf_lifecycle.cli.verification import prune as prune_directory
from hf_lifecycle.cli.verification import verify as verify_path
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.errors import LifecycleError, NoUsableCheckpoint
from hf_lifecycle.views import text
from hf_lifecycle.views.run import Checkpoint, Run, existing_directory

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-lifecycle",
    help="Show, verify, compare and prune the checkpoints of a run.",
    epilog="Exit codes: 0 good, 1 bad or different, 2 wrong use.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory of checkpoints: a run's output_dir.")]
CheckpointPath = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="One checkpoint: checkpoint-N.")]


class Mode(enum.Enum):
    """Whether a lower or a higher metric is better."""

    min = "min"
    max = "max"


def main() -> None:
    """Run the command line."""
    app()


@app.command("list")
@answers
def list_checkpoints(
    directory: Directory,
    events: Annotated[int, typer.Option("--events", min=0, help="Show the last N events.")] = 5,
    as_json: AsJson = False,
) -> int:
    """List the checkpoints of a directory, newest first, with their problems."""
    found = Run(directory).report()
    report(found, partial(text.draw_directory, events=events), as_json=as_json)
    rows = found["checkpoints"]
    return GOOD if rows and all(row["whole"] for row in rows) else BAD


@app.command()
@answers
def doctor(directory: Directory, as_json: AsJson = False) -> int:
    """Show in ten lines whether a run can be resumed, what would differ here, and what to do next."""
    return _diagnosis(directory, as_json=as_json)


def _diagnosis(directory: Path, *, as_json: bool) -> int:
    found = diagnose(Run(directory).path)
    report(found, draw_diagnosis, as_json=as_json)
    return BAD if found["resumes_from"] is None and (found["faulty"] or found["damaged"]) else GOOD


@app.command()
@answers
def show(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint; for a directory of them, as doctor.")],
    as_json: AsJson = False,
) -> int:
    """Show the content of one checkpoint: progress, metric, RNG states, environment, tensors."""
    if not is_checkpoint(path) and checkpoints_in(existing_directory(path)):
        return _diagnosis(path, as_json=as_json)
    found = with_place(Checkpoint(path).report())
    report(found, draw_checkpoint_here, as_json=as_json)
    return GOOD if found["whole"] else BAD


@app.command()
@answers
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a directory of them.")],
    quick: Annotated[bool, typer.Option("--quick", help="Check only presence and sizes.")] = False,
    as_json: AsJson = False,
) -> int:
    """Check every byte of a checkpoint, or of each checkpoint of a directory."""
    found = verify_path(existing_directory(path), full=not quick)
    report(found, drawing.draw_verification, as_json=as_json)
    rows = found["checkpoints"]
    return GOOD if rows and all(row["whole"] for row in rows) else BAD


@app.command()
@answers
def accept(
    checkpoint: CheckpointPath,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept without asking.")] = False,
    as_json: AsJson = False,
) -> int:
    """Accept edited files of a checkpoint: show what differs, and write a new manifest."""

    def ask(found: Mapping[str, Any]) -> bool:
        if yes or as_json:
            return yes
        report(found, partial(drawing.draw_acceptance, answered=False), as_json=False)
        return typer.confirm("Accept these files as they are now?")

    found = accept_edits(Checkpoint(checkpoint).path, ask)
    asked = found["edits"] and not (yes or as_json or found["refused"])
    report(found, drawing.draw_answer if asked else drawing.draw_acceptance, as_json=as_json)
    return GOOD if found["accepted"] or not (found["edits"] or found["refused"]) else BAD


@app.command()
@answers
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="One checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    limit: Annotated[int, typer.Option("--limit", min=0, help="Differences shown per group; 0: all.")] = 10,
    as_json: AsJson = False,
) -> int:
    """Compare two checkpoints bit for bit: the first difference, and all others."""
    one, other = Checkpoint(a), Checkpoint(b)
    problems = one.problems or other.problems
    if problems:
        raise LifecycleError("; ".join(problems))
    from hf_lifecycle.cli.comparison import diff as compare  # it needs torch, which no other command waits for

    found = compare(one.path, other.path)
    report(found, partial(drawing.draw_diff, limit=limit), as_json=as_json)
    return GOOD if found["identical"] else BAD


@app.command()
@answers
def prune(
    directory: Directory,
    keep_last: Annotated[int | None, typer.Option("--keep-last", min=1, help="Keep the last N.")] = None,
    keep_best: Annotated[
        int | None, typer.Option("--keep-best", min=1, help="Keep the best N, too; with --mode.")
    ] = None,
    keep_every: Annotated[
        int | None, typer.Option("--keep-every", min=1, help="Keep one in every N steps, too.")
    ] = None,
    keep_every_hours: Annotated[
        float | None, typer.Option("--keep-every-hours", help="Keep one in N hours, too.")
    ] = None,
    mode: Annotated[Mode | None, typer.Option("--mode", help="Whether a lower or a higher metric is better.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be removed.")] = False,
    as_json: AsJson = False,
) -> int:
    """Remove checkpoints; never the newest intact one, the best, or one that lacks files."""
    if keep_best is not None and mode is None:
        raise ValueError("--keep-best needs --mode min or --mode max")
    chosen: dict[Callable[..., RetentionPolicy], float | None] = {
        KeepLast: keep_last,
        partial(KeepBest, mode="max" if mode is Mode.max else "min"): keep_best,
        KeepEverySteps: keep_every,
        KeepEveryHours: keep_every_hours,
    }
    policies = [policy(most) for policy, most in chosen.items() if most is not None]
    if not policies:
        raise ValueError("say what to keep: --keep-last N, --keep-best N, --keep-every N or --keep-every-hours N")
    found = prune_directory(Run(directory).path, AnyOf(tuple(policies)), dry_run=dry_run)
    report(found, drawing.draw_prune, as_json=as_json)
    return GOOD


@app.command()
@answers
def replay(
    path: Annotated[
        Path, typer.Argument(metavar="DIR", help="A directory of checkpoints, one checkpoint, or a trainer_state.json.")
    ],
    patience: Annotated[int, typer.Option("--patience", min=0, help="Evaluations without an improvement.")],
    min_delta: Annotated[float, typer.Option("--min-delta", help="The gain that an improvement has to exceed.")] = 0.0,
    metric: Annotated[str, typer.Option("--metric", help="The metric's name in the log.")] = "eval_loss",
    mode: Annotated[
        Mode | None, typer.Option("--mode", help="Default: min for a loss, else max, as in Trainer.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Write the plot to a file.")] = None,
    as_json: AsJson = False,
) -> int:
    """Show when early stopping would have ended a finished run."""
    history = _history(path)
    if history.is_dir():
        read_trainer_state(history)  # refuses what is no file before it is opened
    chosen = ("min" if metric.endswith("loss") else "max") if mode is None else mode.value
    found = EarlyStopping.replay(history, metric=metric, patience=patience, min_delta=min_delta, mode=chosen)
    if plot is not None:
        found.plot().savefig(plot)
    kept = ("metric", "stopped_at", "epoch", "reason", "best_metric", "best_step", "evaluations", "saved_steps")
    told = {
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
    report(told, drawing.draw_replay, as_json=as_json)
    return GOOD


def _history(path: Path) -> Path:
    """A file or a checkpoint as it is; of a directory of checkpoints the newest that is whole."""
    if not path.is_dir() or is_checkpoint(path):
        return path
    run = Run(path)
    if run.newest is not None:
        return run.newest.path
    problems = [problem for checkpoint in run.checkpoints for problem in checkpoint.problems]
    raise NoUsableCheckpoint(path, problems) if problems else FileNotFoundError(f"{path}: no checkpoints here")
