"""What this process has read of a checkpoint and found whole, so that a resume can say so without reading it again.

Not promised: that nobody has changed a file since. What was loaded is proved by the tensors' digests.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from hf_lifecycle.checkpoint.manifest import Manifest, manifest_path

__all__ = ["Verified", "recall", "remember"]


@dataclass(frozen=True, slots=True)
class Verified:
    """Every byte of so many files was read, and had the digest of the manifest.

    Attributes:
        files: How many files.
        bytes: How many bytes in all.
        seconds: How long that took.
    """

    files: int
    bytes: int
    seconds: float


_known: dict[str, tuple[int, Verified]] = {}  # by path: when its manifest was written, and what was found


def remember(checkpoint: Path, manifest: Manifest, seconds: float) -> None:
    """Note that all files of ``manifest`` were read and are whole."""
    size = sum(entry.size for entry in manifest.files)
    _known[os.path.abspath(checkpoint)] = _written(checkpoint), Verified(len(manifest.files), size, seconds)


def recall(checkpoint: Path) -> Verified | None:
    """What was noted of a checkpoint, as long as it has the same manifest."""
    written, found = _known.get(os.path.abspath(checkpoint), (None, None))
    return found if found is not None and written == _written(checkpoint) else None


def _written(checkpoint: Path) -> int:
    try:
        return manifest_path(checkpoint).stat().st_mtime_ns
    except OSError:
        return -1
