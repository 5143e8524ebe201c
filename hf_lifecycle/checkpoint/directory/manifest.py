"""The manifest: every file of a whole checkpoint with its size and digest, written when all of them are on the disk.

Promise: a directory whose manifest verifies holds the bytes that were committed. A directory without one was never
committed by this package. Reading a manifest executes nothing, and no name in it can lead out of its directory. The
digest (XXH3-128) finds accidents; whoever can rewrite files can rewrite the manifest too.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lifecycle.checkpoint.files.regular import leads_nowhere_else, read_bounded, walk
from hf_lifecycle.checkpoint.files.structure import DamagedStateError, parse
from hf_lifecycle.errors import StateFileError

__all__ = [
    "LARGEST_MANIFEST",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "Metric",
    "can_be_listed",
    "files_below",
    "manifest_if_readable",
    "manifest_path",
    "parse_manifest",
    "read_manifest",
]

MANIFEST = PurePosixPath("lifecycle/manifest.json")
FORMAT = "hf_lifecycle.checkpoint"
VERSION = 2
_FIRST_WITH_OLDER = 2
LARGEST_MANIFEST = 64 << 20

_DIGEST = re.compile(r"[0-9a-f]{32}")
_KEYS = {"format", "version", "attempt", "step", "epoch", "world_size", "created", "metric", "files"}


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file: its path within the checkpoint with ``/``, its size in bytes, and its XXH3-128 in hexadecimal."""

    path: str
    size: int
    xxh3_128: str


@dataclass(frozen=True, slots=True)
class Metric:
    """What the run was judged by when the checkpoint was saved."""

    name: str
    value: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a checkpoint is and consists of.

    Attributes:
        attempt: The call of ``train()`` that saved it.
        epoch: Epochs done, with a fraction.
        created: When it was committed, ISO 8601, UTC.
        metric: The metric that the run is judged by, or None where it has none yet.
        files: Every file but the manifest, in the order of their paths.
        older: The attempts, and the names of checkpoints without manifest, that were there when this run began anew.
    """

    attempt: str
    step: int
    epoch: float
    world_size: int
    created: str
    metric: Metric | None
    files: tuple[FileEntry, ...]
    older: tuple[str, ...] = ()

    def to_json(self) -> bytes:
        """The manifest as it lies on the disk."""
        # JSON has no NaN and no infinity, and a metric that is one of them ranks no checkpoint.
        judged = self.metric is not None and math.isfinite(self.metric.value)
        known = self if judged else replace(self, metric=None)
        # Invariant: without older runs, which are rare, what is written is what the first version reads.
        body = {"format": FORMAT, "version": _FIRST_WITH_OLDER if known.older else 1, **asdict(known)}
        if not known.older:
            del body["older"]
        return json.dumps(body, indent=1, allow_nan=False).encode() + b"\n"


def manifest_path(checkpoint: Path) -> Path:
    """Where a checkpoint's manifest is."""
    return checkpoint / MANIFEST


def files_below(checkpoint: Path) -> Iterator[Path]:
    """Every regular file of a checkpoint but its manifest, in the order of their paths; links are not followed."""
    own = manifest_path(checkpoint)
    yield from sorted(path for path in walk(checkpoint) if path != own and stat.S_ISREG(path.lstat().st_mode))


def read_manifest(checkpoint: Path) -> Manifest:
    """Read and check a checkpoint's manifest.

    Raises:
        FileNotFoundError: There is none.
        StateFileError: It is torn, foreign, hostile or of a newer format.
    """
    path = manifest_path(checkpoint)
    if not leads_nowhere_else(checkpoint, path):
        raise StateFileError(path, "a symbolic link to outside the checkpoint")
    try:
        return parse_manifest(path, read_bounded(path, LARGEST_MANIFEST))
    except ValueError as error:
        raise StateFileError(path, f"larger than {LARGEST_MANIFEST >> 20} MiB, which no manifest is") from error


def manifest_if_readable(checkpoint: Path) -> Manifest | None:
    """A checkpoint's manifest; None where there is none that can be read."""
    try:
        return read_manifest(checkpoint)
    except (OSError, StateFileError):
        return None


def parse_manifest(path: str | os.PathLike[str], text: bytes) -> Manifest:
    """Check what was read as a checkpoint's manifest, which errors call ``path``.

    Raises:
        StateFileError: It is torn, foreign, hostile or of a newer format.
    """
    try:
        body = parse(text)
    except DamagedStateError as error:
        raise StateFileError(path, f"not a complete JSON document ({error})") from error
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise StateFileError(path, "not a manifest of this package")
    if type(body.get("version")) is not int or not 1 <= body["version"] <= VERSION:
        raise StateFileError(
            path, f"format version {body.get('version')!r}, this package reads up to {VERSION}; install a newer one"
        )
    try:
        manifest = _parse(body)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise StateFileError(path, f"not a valid manifest ({error})") from error
    if not text.endswith(b"\n"):
        raise StateFileError(path, "its last byte, a line feed, is missing")
    return manifest


def _parse(body: Mapping[str, Any]) -> Manifest:
    keys = _KEYS | {"older"} if body["version"] >= _FIRST_WITH_OLDER else _KEYS
    if set(body) != keys:
        raise ValueError(f"keys {sorted(set(body) ^ keys)} are missing or unknown")
    files = tuple(_parse_entry(entry) for entry in body["files"])
    if len({entry.path for entry in files}) != len(files):
        raise ValueError("a file is listed twice")
    metric = None if body["metric"] is None else _parse_metric(body["metric"])
    return Manifest(
        attempt=_text(body, "attempt"),
        step=_count(body, "step"),
        epoch=_number(body, "epoch"),
        world_size=_count(body, "world_size"),
        created=_text(body, "created"),
        metric=metric,
        files=files,
        older=tuple(_text({"older": key}, "older") for key in body.get("older", ())),
    )


def _parse_metric(metric: Mapping[str, Any]) -> Metric:
    if set(metric) != {"name", "value"}:
        raise ValueError(f"the metric has keys {sorted(metric)}")
    return Metric(_text(metric, "name"), _number(metric, "value"))


def _text(body: Mapping[str, Any], name: str) -> str:
    if not isinstance(body[name], str):
        raise ValueError(f"{name} is {body[name]!r}, not a string")
    return str(body[name])


def _number(body: Mapping[str, Any], name: str) -> float:
    value = body[name]
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r}, not a number")
    return float(value)


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body[name]
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is {value!r}, not a count")
    return value


def _parse_entry(entry: Mapping[str, Any]) -> FileEntry:
    if set(entry) != {"path", "size", "xxh3_128"}:
        raise ValueError(f"a file entry has keys {sorted(entry)}")
    path, digest = entry["path"], entry["xxh3_128"]
    if not isinstance(path, str) or not can_be_listed(path):
        raise ValueError(f"file name {path!r} points outside the checkpoint")
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError(f"{path}: not a digest: {digest!r}")
    return FileEntry(path, _count(entry, "size"), digest)


def can_be_listed(path: str) -> bool:
    """Whether a manifest may name ``path``: on every system it must mean the same file, inside the checkpoint."""
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    pure = PurePosixPath(path)
    bad = "\\" in path or "\0" in path or ":" in path or pure.is_absolute()
    return path not in ("", ".") and not bad and str(pure) == path and ".." not in pure.parts and pure != MANIFEST
