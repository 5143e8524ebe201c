"""Which checkpoints that a person names are whole, and which a policy no longer wants.

These are removed while no run is writing. Promise: the newest checkpoint that verifies, every byte of it, and the best
one stay, whatever the policy says; so does one whose files are missing or of another size, since nothing is known of
what it holds. Of those that are removed, no bytes are read. Nothing is removed while another process holds the
directory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.listing import infos_in
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy, doomed
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, hidden_folder, remove
from hf_lifecycle.checkpoint.directory.verification import bytes_to_read, edited_files, problems_of
from hf_lifecycle.checkpoint.files.durable import make_directories
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.checkpoint.inspection.description import (
    describe_directory,
    is_checkpoint,
    quick_problems,
    read_trainer_state,
)
from hf_lifecycle.errors import NoUsableCheckpoint, StateFileError

__all__ = ["problems_with", "prune", "verify"]


def problems_with(checkpoint: Path, *, full: bool, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is wrong with a checkpoint, whatever lies in it; ``advance`` is told of bytes that were read.

    ``full`` reads every file and compares its digest with the manifest's, else presence and sizes are looked at.
    """
    problems = quick_problems(checkpoint)
    # An edit is not the whole story: what else differs may have the size that it had.
    is_read = full and (not problems or edited_files(checkpoint, problems))
    return problems_of(checkpoint, full=True, advance=advance) if is_read else problems


def verify(path: Path, *, full: bool) -> dict[str, Any]:
    """Verify one checkpoint, or all of a directory, newest first."""
    checkpoints = [path] if is_checkpoint(path) else [found for _, found in checkpoints_in(path)]
    rows = []
    with reading(f"verifying {path.name}", sum(map(bytes_to_read, checkpoints)) if full else 0) as advance:
        for checkpoint in checkpoints:
            problems = problems_with(checkpoint, full=full, advance=advance)
            checked = "every byte" if full else "presence and sizes"
            if not manifest_path(checkpoint).exists():
                checked = "no manifest; structure of its files"
            row = {"path": str(checkpoint), "whole": not problems, "problems": problems, "checked": checked}
            rows.append(row | {"edited": list(edited_files(checkpoint, problems))})
    return {"path": str(path), "full": full, "checkpoints": rows}


def prune(directory: Path, policy: RetentionPolicy, *, dry_run: bool) -> dict[str, Any]:
    """Remove what ``policy`` does not keep, or only say what that would be.

    Raises:
        DirectoryInUse: Another process trains into the directory.
        NoUsableCheckpoint: No checkpoint verifies, so that none can be spared.
        OSError: One cannot be removed.
    """
    if dry_run:
        return _prune(directory, policy, dry_run=True)
    folder = hidden_folder(directory)
    make_directories(folder)
    with DirectoryLock(folder / "lock"):
        return _prune(directory, policy, dry_run=False)


def _prune(directory: Path, policy: RetentionPolicy, *, dry_run: bool) -> dict[str, Any]:
    rows = describe_directory(directory)["checkpoints"]
    spared = _spared(directory, rows)
    infos = [info for info in infos_in(directory) if spared.get(info.path.name) != "damaged"]
    unwanted = doomed(infos, policy, [directory / name for name in spared])
    gone = {info.path for info in unwanted}
    listed = []
    for row in rows:
        path = Path(row["path"])
        why = spared.get(row["name"], "")
        listed.append({"name": row["name"], "size": row["size"], "removed": path in gone, "why": why})
    if not dry_run:
        log = EventLog(directory)
        for info in unwanted:
            remove(info.path)
            log.write("removed", step=info.step, path=info.path.name, why="hf-lifecycle prune")
    freed = sum(row["size"] for row in listed if row["removed"])
    return {"directory": str(directory), "dry_run": dry_run, "checkpoints": listed, "freed": freed}


def _spared(directory: Path, rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The checkpoints that no policy may take, and why."""
    spared = {row["name"]: "damaged" for row in rows if not row["whole"]}
    problems = [problem for row in rows for problem in row["problems"]]
    whole = sorted((row for row in rows if row["whole"]), key=lambda row: bool(row["older_run"]))
    for row in whole:
        with reading(f"verifying {row['name']}", row["size"]) as advance:
            found = problems_with(Path(row["path"]), full=True, advance=advance)
        if not found:
            best = _best(Path(row["path"]))
            if best is not None and best not in spared and (directory / best).is_dir():
                spared[best] = "best"
            spared[row["name"]] = "newest that verifies"
            return spared
        spared[row["name"]] = "damaged"
        problems += found
    if rows:
        raise NoUsableCheckpoint(directory, problems)
    return spared


def _best(checkpoint: Path) -> str | None:
    """The name of the best checkpoint, as the run knew it."""
    try:
        best = read_trainer_state(checkpoint).get("best_model_checkpoint")
    except (FileNotFoundError, StateFileError):
        return None
    return Path(best).name if isinstance(best, str) else None
