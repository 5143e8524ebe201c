"""The receipt of a resume: what was verified, restored, proved and repaired, and whether the run continues exactly.

It lies in ``.lifecycle/receipts/`` of the output directory, one JSON file for each resume, named by the attempt that
began with it; ``lifecycle.jsonl`` names the attempt too. It is no part of a checkpoint: what is committed is not
touched. The last :data:`KEPT` are kept.

Promise: written whole or not at all. A receipt that cannot be written is a warning and stops no training; one that
cannot be read is skipped.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.store import discard, hidden_folder, working_folder
from hf_lifecycle.checkpoint.files.durable import write_atomically
from hf_lifecycle.checkpoint.files.regular import read_json

__all__ = ["FORMAT", "KEPT", "last_receipt_of", "read_receipts", "write_receipt"]

logger = logging.getLogger(__name__)

KEPT = 20
_LARGEST = 4 << 20
FORMAT = 1


def write_receipt(directory: Path, receipt: Mapping[str, Any]) -> Path | None:
    """Write a receipt, plain data, and remove what is too old. Returns the file, None if it failed."""
    content = json.dumps(receipt, indent=2).encode() + b"\n"
    try:
        folder = working_folder(directory, "receipts")
        file = folder / f"{receipt['attempt']}.json"
        write_atomically(file, lambda opened: opened.write(content))
        newest_last = sorted(folder.glob("*.json"), key=lambda path: (path == file, path.lstat().st_mtime_ns))
        for old in newest_last[:-KEPT]:
            discard(old)
    except OSError as error:
        logger.warning("%s: the receipt of this resume could not be written (%s)", directory, error.strerror or error)
        return None
    return file


def read_receipts(directory: Path) -> list[dict[str, Any]]:
    """The receipts of an output directory, newest last, as plain data; nothing else in the folder is read."""
    folder = hidden_folder(directory) / "receipts"
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() and not folder.is_symlink() else []:
        try:
            if path.is_symlink():
                continue
            body = read_json(path, _LARGEST)
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(body, dict) and body.get("format") == FORMAT:
            found.append((str(body.get("time")), body))
    return [body for _, body in sorted(found, key=lambda each: each[0])]


def last_receipt_of(checkpoint: Path, attempt: str | None) -> dict[str, Any] | None:
    """The receipt of the last resume from a checkpoint that ``attempt`` saved; None where there is none."""
    own = [
        body
        for body in read_receipts(checkpoint.resolve().parent)
        if body.get("checkpoint") == checkpoint.resolve().name and body.get("saved_by") == attempt
    ]
    return own[-1] if own else None
