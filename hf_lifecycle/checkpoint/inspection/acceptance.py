"""A person's word that a checkpoint is to be resumed from though a file of it was edited.

The word is a new manifest, which lists the files as they are now, and beside it ``lifecycle/accepted-N.json``: when,
which files, and what they were. The manifest lists that too, so it goes wherever the checkpoint goes.

Promise: only texts that people read and edit (:mod:`hf_lifecycle.checkpoint.directory.verification`) can be accepted.
Every byte that is accepted is on the disk before the manifest is; a kill leaves the old manifest or the new one.

Not promised: that the edit makes sense.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.manifest import FileEntry, Manifest, manifest_if_readable, manifest_path
from hf_lifecycle.checkpoint.files.additions import mark_in
from hf_lifecycle.checkpoint.files.durable import flush, write_atomically
from hf_lifecycle.checkpoint.files.regular import digest_file, read_json
from hf_lifecycle.messages import few

__all__ = ["Edit", "accept", "accepted_in", "edit_of", "obstacles", "said_of_accepted"]

_RECORD = re.compile(r"lifecycle/accepted-(\d+)\.json")
_STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Edit:
    """One file that was edited: as the manifest lists it, as it is now, and when it was written (ISO 8601, UTC)."""

    was: FileEntry
    now: FileEntry
    changed: str


def edit_of(checkpoint: Path, was: FileEntry) -> Edit:
    """The file as it is now.

    Raises:
        OSError: It cannot be read.
    """
    path = checkpoint / was.path
    digest, status = digest_file(path), path.stat()
    changed = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="seconds")
    return Edit(was, FileEntry(was.path, status.st_size, digest), changed)


def obstacles(checkpoint: Path, manifest: Manifest, edits: Sequence[Edit]) -> list[str]:
    """Why the edits cannot be accepted though their files can be read; nothing, if they can."""
    if not any(edit.was.path == _STATE for edit in edits):
        return []
    state = read_json(checkpoint / _STATE)
    step, found = state.get("global_step"), []
    if type(step) is not int or step != manifest.step:
        found.append(
            f"{_STATE}: global_step is {step!r}, and optimizer, schedule, data and RNG state are those of step "
            f"{manifest.step}; set global_step back to that"
        )
    saved_by_callback = any(entry.path.startswith("lifecycle/rank-") for entry in manifest.files)
    mark = mark_in(state.get("stateful_callbacks"))
    if saved_by_callback and mark != {"attempt": manifest.attempt, "step": manifest.step}:
        found.append(f"{_STATE}: the entry of hf_lifecycle in stateful_callbacks is missing or changed; restore it")
    return found


def accept(checkpoint: Path, manifest: Manifest, edits: Sequence[Edit]) -> None:
    """Write the manifest that lists the edited files as they were looked at; nobody else writes to ``checkpoint``.

    Raises:
        OSError: The disk did not take it. The manifest is the one that was there.
    """
    for edit in edits:
        flush(checkpoint / edit.now.path)
    numbers = [int(found[1]) for entry in manifest.files if (found := _RECORD.fullmatch(entry.path))]
    name = f"lifecycle/accepted-{max(numbers, default=0) + 1}.json"
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    record = {"time": time, "files": [{"was": asdict(edit.was), "now": asdict(edit.now)} for edit in edits]}
    content = json.dumps(record, indent=1).encode() + b"\n"
    # Invariant: under a name that no manifest lists yet, so that a kill before the next one damages nothing.
    write_atomically(checkpoint / name, lambda file: file.write(content))
    now = {edit.now.path: edit.now for edit in edits}
    files = [now.get(entry.path, entry) for entry in manifest.files]
    files.append(FileEntry(name, len(content), digest_file(checkpoint / name)))
    listed = replace(manifest, files=tuple(sorted(files, key=lambda entry: Path(entry.path))))
    write_atomically(manifest_path(checkpoint), lambda file: file.write(listed.to_json()))


def accepted_in(checkpoint: Path) -> list[dict[str, Any]]:
    """What was accepted: ``time`` and ``files`` of each time, the oldest first; what cannot be read is skipped."""
    manifest = manifest_if_readable(checkpoint)
    entries = () if manifest is None else manifest.files
    numbered = [(int(found[1]), entry) for entry in entries if (found := _RECORD.fullmatch(entry.path))]
    records = []
    for _, entry in sorted(numbered, key=lambda each: each[0]):
        try:
            record = read_json(checkpoint / entry.path)
            files = [str(each["now"]["path"]) for each in record["files"]]
            records.append({"time": str(record["time"]), "files": files})
        except (OSError, ValueError, RecursionError, KeyError, TypeError):
            continue
    return records


def said_of_accepted(checkpoint: Path) -> list[str]:
    """Why a resume from ``checkpoint`` does not continue the run that was saved; nothing, where nothing was edited."""
    return [f"{few(one['files'])} edited by hand, and accepted on {one['time']}" for one in accepted_in(checkpoint)]
