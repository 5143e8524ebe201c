"""``hf-lifecycle``: list, show, verify, diff, prune and replay what a run left on the disk.

Every command takes ``--json``. Exit codes: 0 good, 1 bad or different, 2 wrong use.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from hf_lifecycle.checkpoint.store import checkpoints_in
from hf_lifecycle.cli.inspection import describe_checkpoint, describe_directory, is_checkpoint, quick_problems
from hf_lifecycle.cli.output import BAD, GOOD, UsageProblem, answers, report
from hf_lifecycle.cli.verification import verify as verify_path
from hf_lifecycle.errors import LifecycleError
from hf_lifecycle.views import text

__all__ = ["app", "main"]

app = typer.Typer(
    name="hf-lifecycle",
    help="See, verify, compare and prune the checkpoints of a run.",
    epilog="Exit codes: 0 good, 1 bad or different, 2 wrong use.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A directory of checkpoints: a run's output_dir.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="One checkpoint: checkpoint-N.")]


def main() -> None:
    """Run the command line."""
    app()


def _directory(path: Path) -> Path:
    """``path`` as a directory of checkpoints."""
    _existing(path)
    if is_checkpoint(path):
        raise UsageProblem(f"{path} is one checkpoint; give its directory, or use: hf-lifecycle show {path}")
    return path


def _checkpoint(path: Path) -> Path:
    """``path`` as one checkpoint."""
    _existing(path)
    inside = checkpoints_in(path)
    if inside:
        raise UsageProblem(f"{path} is a directory of checkpoints; give one of them, such as {inside[0][1]}")
    if not is_checkpoint(path):
        raise UsageProblem(f"{path} is no checkpoint: it has neither trainer_state.json nor lifecycle/")
    return path


def _existing(path: Path) -> None:
    if not path.exists():
        raise UsageProblem(f"{path}: there is no such directory")
    if not path.is_dir():
        raise UsageProblem(f"{path} is a file, not a directory")


@app.command("list")
@answers
def list_checkpoints(directory: Directory, as_json: AsJson = False) -> int:
    """List the checkpoints of a directory, newest first, and what is wrong with them."""
    found = describe_directory(_directory(directory))
    report(found, text.draw_directory, as_json=as_json)
    rows = found["checkpoints"]
    return GOOD if rows and all(row["whole"] for row in rows) else BAD


@app.command()
@answers
def show(checkpoint: Checkpoint, as_json: AsJson = False) -> int:
    """Show what one checkpoint holds: progress, metric, random numbers, environment, tensors."""
    found = describe_checkpoint(_checkpoint(checkpoint))
    report(found, text.draw_checkpoint, as_json=as_json)
    return GOOD if found["whole"] else BAD


@app.command()
@answers
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a directory of them.")],
    full: Annotated[bool, typer.Option("--full", help="Read every file and compare its digest.")] = False,
    as_json: AsJson = False,
) -> int:
    """Say whether a checkpoint, or each of a directory, is whole."""
    _existing(path)
    found = verify_path(path, full=full)
    report(found, text.draw_verification, as_json=as_json)
    rows = found["checkpoints"]
    return GOOD if rows and all(row["whole"] for row in rows) else BAD


@app.command()
@answers
def diff(
    a: Annotated[Path, typer.Argument(metavar="A", help="One checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    limit: Annotated[int, typer.Option("--limit", min=0, help="Differences shown to a group; 0: all.")] = 10,
    as_json: AsJson = False,
) -> int:
    """Compare two checkpoints bit for bit: the first difference, and all of them."""
    one, other = _comparable(a), _comparable(b)
    from hf_lifecycle.cli.comparison import diff as compare  # it needs torch, which no other command waits for

    found = compare(one, other)
    report(found, partial(text.draw_diff, limit=limit), as_json=as_json)
    return GOOD if found["identical"] else BAD


def _comparable(path: Path) -> Path:
    """``path`` as a checkpoint whose files are all there."""
    problems = quick_problems(_checkpoint(path))
    if problems:
        raise LifecycleError("; ".join(problems))
    return path
