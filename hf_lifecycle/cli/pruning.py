"""Which checkpoints a policy no longer wants, and their removal while no run is writing.

Promise: the newest checkpoint that verifies, every byte of it, and the best one stay, whatever the policy says; so does
one whose files are missing or of another size, since nothing is known of what it holds. Of those that are removed, no
bytes are read. Nothing is removed while another process holds the directory.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.listing import infos_in
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy, doomed
from hf_lifecycle.checkpoint.directory.store import hidden_folder, remove
from hf_lifecycle.checkpoint.files.durable import make_directories
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.checkpoint.inspection.description import describe_directory, read_trainer_state
from hf_lifecycle.cli.verification import problems_with
from hf_lifecycle.errors import NoUsableCheckpoint, StateFileError

__all__ = ["prune"]


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
