"""The receipt of a resume: what was verified, restored, proved and repaired, and whether the run goes on exactly.

It lies in ``.lifecycle/receipts/`` of the output directory, one JSON file for each resume, named by the attempt that
began with it; ``lifecycle.jsonl`` names the attempt too. It is no part of a checkpoint: what is committed is not
touched. The last :data:`KEPT` are kept.

Promise: written whole or not at all. A receipt that cannot be written is a warning and stops no training; one that
cannot be read is passed over.
"""

from __future__ import annotations

import json
import logging
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.durable import write_atomically
from hf_lifecycle.checkpoint.store import discard, hidden_folder, working_folder
from hf_lifecycle.checkpoint.verified import Verified, recall

__all__ = ["KEPT", "Receipt", "last_receipt_of", "read_receipts", "write_receipt"]

logger = logging.getLogger(__name__)

KEPT = 20
_LARGEST = 4 << 20
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Receipt:
    """What one resume found and did.

    Attributes:
        attempt: The attempt that begins with it.
        checkpoint: The name of the checkpoint in the output directory, or its path elsewhere.
        saved_by: The attempt that saved it.
        step: The optimizer step it goes on from.
        verified: Files, bytes and seconds of a reading of every byte in this process; None where there was none.
        restored: The names of what was restored.
        proved: How many of each kind were held against their digests.
        repaired: The names of tensors and values that loading had lost.
        differences: What is not as it was when the checkpoint was saved: ``grade`` and ``what``.
        why_not_exact: Why the run does not go on exactly; empty where it does.
        seconds: What restoring and proving took.
        time: When, in ISO 8601.
    """

    attempt: str
    checkpoint: str
    saved_by: str
    step: int
    verified: Verified | None
    restored: tuple[str, ...]
    proved: Mapping[str, int]
    repaired: tuple[str, ...]
    differences: tuple[Mapping[str, str], ...]
    why_not_exact: tuple[str, ...]
    seconds: float
    time: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))

    @property
    def verified_text(self) -> str:
        """What was read before, in a few words."""
        if self.verified is None:
            return "no file read before"
        return f"{self.verified.files} files, {self.verified.bytes:,} bytes"

    @property
    def is_exact(self) -> bool:
        """Whether the run goes on exactly."""
        return not self.why_not_exact

    @classmethod
    def of(
        cls,
        checkpoint: Path,
        directory: Path,
        identity: Mapping[str, Any],
        *,
        attempt: str,
        restored: Sequence[str],
        proved: Mapping[str, int],
        repaired: Sequence[str],
        differences: Sequence[tuple[str, str]],
        why_not_exact: Sequence[str],
        seconds: float,
    ) -> Receipt:
        """The receipt of a resume from ``checkpoint``, whose state has this ``identity``; a difference: grade, what."""
        inside = checkpoint.parent.resolve() == directory.resolve()
        return cls(
            attempt=attempt,
            checkpoint=checkpoint.name if inside else str(checkpoint),
            saved_by=str(identity["attempt"]),
            step=int(identity["step"]),
            verified=recall(checkpoint),
            restored=tuple(restored),
            proved={kind: count for kind, count in proved.items() if kind != "repaired"},
            repaired=tuple(repaired),
            differences=tuple({"grade": grade, "what": what} for grade, what in differences),
            why_not_exact=tuple(why_not_exact),
            seconds=round(seconds, 6),
        )

    def to_json(self) -> bytes:
        """The file's content."""
        return json.dumps({"format": _FORMAT, "exact": self.is_exact, **asdict(self)}, indent=2).encode() + b"\n"


def write_receipt(directory: Path, receipt: Receipt) -> Path | None:
    """Write a receipt and remove those that are too old to be kept. Returns the file, None where it failed."""
    try:
        folder = working_folder(directory, "receipts")
        file = folder / f"{receipt.attempt}.json"
        write_atomically(file, lambda opened: opened.write(receipt.to_json()))
        newest_last = sorted(folder.glob("*.json"), key=lambda path: (path == file, path.lstat().st_mtime_ns))
        for old in newest_last[:-KEPT]:
            discard(old)
    except OSError as error:
        logger.warning("%s: the receipt of this resume is not written (%s)", directory, error.strerror or error)
        return None
    return file


def read_receipts(directory: Path) -> list[dict[str, Any]]:
    """The receipts of an output directory, newest last, as plain data; nothing else in the folder is read."""
    folder = hidden_folder(directory) / "receipts"
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() and not folder.is_symlink() else []:
        try:
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
                continue
            body = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        if isinstance(body, dict) and body.get("format") == _FORMAT:
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
