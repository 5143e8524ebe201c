"""Whether the checkpoints that a person names are whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.directory.verification import bytes_to_read, edited_files, problems_of
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.checkpoint.inspection.description import is_checkpoint, quick_problems

__all__ = ["problems_with", "verify"]


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
