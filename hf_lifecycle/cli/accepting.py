"""What a person edited in a checkpoint: shown, and accepted once they say so.

Promise: a checkpoint of which anything else differs is refused, and nothing is written before the answer. No run that
trains in the directory is disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import Manifest, manifest_path, read_manifest
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, hidden_folder
from hf_lifecycle.checkpoint.directory.verification import bytes_to_read, edits_in
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.checkpoint.files.regular import digest_file, read_json
from hf_lifecycle.checkpoint.inspection.acceptance import Edit, accept, edit_of, obstacles
from hf_lifecycle.cli.leaves import leaves
from hf_lifecycle.cli.verification import problems_with
from hf_lifecycle.messages import cut, few

__all__ = ["accept_edits"]

Report = dict[str, Any]

_TOLD = ("global_step", "epoch", "max_steps", "num_train_epochs", "best_metric", "best_model_checkpoint")
_BACKUPS = ("~", ".bak", ".orig", ".old")


def accept_edits(checkpoint: Path, ask: Callable[[Report], bool]) -> Report:
    """Look at what differs in ``checkpoint``, and accept it where ``ask``, which is shown the report, says so.

    Raises:
        DirectoryInUse: Another process trains into the directory.
        OSError: The new manifest cannot be written; the old one is there.
        ValueError: There is no manifest to compare with.
    """
    if not manifest_path(checkpoint).exists():
        raise ValueError(f"{checkpoint} has no manifest to compare its files with, so there is nothing to accept")
    with _alone(checkpoint.absolute().parent) as log:
        with reading(f"verifying {checkpoint.name}", bytes_to_read(checkpoint)) as advance:
            problems = problems_with(checkpoint, full=True, advance=advance)
        known = edits_in(checkpoint) if problems else {}
        refused = [problem for problem in problems if problem not in known.values()]
        report: Report = {"path": str(checkpoint), "edits": [], "refused": refused, "accepted": False}
        if not problems or (refused and not known):
            return report
        manifest = read_manifest(checkpoint)
        edits = [edit_of(checkpoint, entry) for entry in manifest.files if entry.path in known]
        report["edits"] = [_shown(checkpoint, manifest, edit) for edit in edits]
        refused += obstacles(checkpoint, manifest, edits)
        if not refused and ask(report):
            accept(checkpoint, manifest, edits)
            report["accepted"] = True
            if log is not None:
                why = f"{few([edit.now.path for edit in edits])} edited by hand"
                log.write("accepted", step=manifest.step, path=checkpoint.name, why=why)
    return report


@contextmanager
def _alone(directory: Path) -> Iterator[EventLog | None]:
    """Hold the directory; where no run of this package has been, there is nothing to hold and no log."""
    if not hidden_folder(directory).is_dir():
        yield None
        return
    with DirectoryLock(hidden_folder(directory) / "lock"):
        yield EventLog(directory)


def _shown(checkpoint: Path, manifest: Manifest, edit: Edit) -> Report:
    path = checkpoint / edit.now.path
    shown: Report = {
        "path": edit.now.path,
        "was": {"size": edit.was.size, "xxh3_128": edit.was.xxh3_128},
        "now": {"size": edit.now.size, "xxh3_128": edit.now.xxh3_128},
        "changed": edit.changed,
        "saved": manifest.created,
        "old_copy": None,
        "changes": None,
        "values": None,
    }
    old = _old_copy(checkpoint, edit)
    if old is not None:
        shown |= {"old_copy": str(old), "changes": _changes_between(old, path)}
    elif edit.now.path == "trainer_state.json":
        state = read_json(path)
        shown["values"] = {name: cut(repr(state.get(name))) for name in _TOLD}
        shown["values"]["rows of log_history"] = str(len(state.get("log_history") or ()))
    return shown


def _old_copy(checkpoint: Path, edit: Edit) -> Path | None:
    """A file that has the bytes of before: what an editor left beside it, or the same one of another checkpoint."""
    path = checkpoint / edit.was.path
    beside = [path.with_name(path.name + suffix) for suffix in _BACKUPS]
    others = [other / edit.was.path for _, other in checkpoints_in(checkpoint.absolute().parent)]
    for candidate in (*beside, *others):
        try:
            same = candidate.stat().st_size == edit.was.size and digest_file(candidate) == edit.was.xxh3_128
        except OSError:
            continue
        if same:
            return candidate
    return None


def _changes_between(old: Path, new: Path) -> list[str] | None:
    """What differs between two JSON files, a sentence for each value; None where they are other texts."""
    if new.suffix != ".json":
        return None
    try:
        one, other = ({name: repr(value) for name, value in leaves(read_json(path)).items()} for path in (old, new))
    except (OSError, ValueError, RecursionError):
        return None
    named = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return [f"{name}: {cut(one.get(name, '-'))} -> {cut(other.get(name, '-'))}" for name in named]
