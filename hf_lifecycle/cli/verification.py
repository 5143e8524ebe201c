"""Whether checkpoints are whole, with a bar for those that take long to read."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from hf_lifecycle.checkpoint.inspection import is_checkpoint, quick_problems
from hf_lifecycle.checkpoint.manifest import Manifest, read_manifest
from hf_lifecycle.checkpoint.store import checkpoints_in
from hf_lifecycle.errors import StateFileError

__all__ = ["Bar", "problems_with", "verify"]

_BLOCK = 4 << 20
_PATIENCE = 1.0  # seconds without a bar


class Bar:
    """A progress bar on standard error that appears only when there is more than a second to wait.

    Args:
        total: What is to be read, in bytes.
        console: Where it is drawn; standard error if None.
    """

    def __init__(self, total: int, console: Console | None = None) -> None:
        columns = TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self._progress = Progress(*columns, console=console or Console(stderr=True), transient=True)
        self._task = self._progress.add_task("reading", total=total)
        self._began = time.monotonic()
        self._shown = False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shown:
            self._progress.stop()

    def advance(self, size: int) -> None:
        """``size`` more bytes were read."""
        self._progress.advance(self._task, size)
        if not self._shown and time.monotonic() - self._began > _PATIENCE:
            self._progress.start()
            self._shown = True


def _manifest(checkpoint: Path) -> Manifest | None:
    try:
        return read_manifest(checkpoint)
    except (FileNotFoundError, StateFileError):
        return None


def problems_with(checkpoint: Path, *, full: bool, advance: Callable[[int], None] = lambda _: None) -> list[str]:
    """What is wrong with a checkpoint; ``advance`` is told of every block that was read.

    ``full`` reads every file and compares its digest with the manifest's, else presence and sizes are looked at.
    """
    problems = quick_problems(checkpoint)
    manifest = _manifest(checkpoint) if full and not problems else None
    for entry in manifest.files if manifest is not None else ():
        path = checkpoint / entry.path
        try:
            if _digest(path, advance) != entry.xxh3_128:
                problems.append(f"{path}: digest differs from the manifest")
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
    return problems


def _digest(path: Path, advance: Callable[[int], None]) -> str:
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def verify(path: Path, *, full: bool) -> dict[str, Any]:
    """Verify one checkpoint, or all of a directory, newest first."""
    checkpoints = [path] if is_checkpoint(path) else [found for _, found in checkpoints_in(path)]
    manifests = {checkpoint: _manifest(checkpoint) for checkpoint in checkpoints}
    total = sum(entry.size for found in manifests.values() if found is not None for entry in found.files)
    rows = []
    with Bar(total) as bar:
        for checkpoint in checkpoints:
            problems = problems_with(checkpoint, full=full, advance=bar.advance)
            checked = "every byte" if full else "presence and sizes"
            if manifests[checkpoint] is None:
                checked = "no manifest; structure of its files"
            rows.append({"path": str(checkpoint), "whole": not problems, "problems": problems, "checked": checked})
    return {"path": str(path), "full": full, "checkpoints": rows}
