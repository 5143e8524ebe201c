"""Whether a checkpoint is whole, and which ones are known to be.

Promise: :func:`problems_of` looks each time. :func:`verify` reads every byte, too, but what it found whole it does not
read again until :func:`forget`, as long as every file of the directory has the same size, inode and times; a start
would otherwise read a checkpoint three times over. Files that changed within the last second are read again: a change
within one tick of the clock would not show in their times.

What was read in full is noted beside its manifest's time, so that a resume can say so (:func:`recall`).

Not promised: that what a disk does to its own bytes in between, without the system's knowledge, is noticed.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from hf_lifecycle.checkpoint.directory.manifest import FileEntry, manifest_if_readable, manifest_path, read_manifest
from hf_lifecycle.checkpoint.directory.without_manifest import lost_own_files, structural_problems
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.checkpoint.files.regular import digest_file, leads_nowhere_else, read_bounded, read_json, walk
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.messages import few, way_on
from hf_lifecycle.processes.cores import on_cores

__all__ = [
    "bytes_to_read",
    "deleted_files",
    "edited_files",
    "edits_in",
    "forget",
    "in_brief",
    "problems_of",
    "recall",
    "verify",
]

_SETTLED_NS = 1_000_000_000
# What Trainer saves, and does without where it is not there.
_BESIDE_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|training_args\.bin|README\.md|generation_config\.json|"
    r"tokenizer[^/]*|special_tokens_map\.json|added_tokens\.json|vocab\.[a-z]+|merges\.txt|[^/]+\.jinja"
)
# What people read and edit: texts, never tensors and never a state. A change there is more likely a person's than a
# disk's; whether to resume from it is for a person to say (:mod:`hf_lifecycle.checkpoint.inspection.acceptance`).
_TEXTS = frozenset({".txt", ".md", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".csv", ".tsv", ".jsonl", ".py"})
_OWN = "lifecycle/"
_OF_TENSORS = ".index.json"  # says which file a tensor lies in
_OBJECTS = frozenset({"trainer_state.json", "config.json", "generation_config.json", "adapter_config.json"})

Looks = frozenset[tuple[str, int, int, int, int]]

_whole: dict[tuple[str, tuple[str, ...]], Looks] = {}


@dataclass(frozen=True, slots=True)
class Verified:
    """So many files and bytes were read in so many seconds, and all had the digests of the manifest."""

    files: int
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.files} files, {self.bytes:,} bytes"


_verified: dict[str, tuple[int, Verified]] = {}  # by path: when its manifest was written, and what was read


def problems_of(
    checkpoint: Path, *, full: bool, only: Sequence[str] = (), advance: Callable[[int], None] = lambda _: None
) -> list[str]:
    """What is wrong with a checkpoint; nothing, if it is whole.

    Args:
        checkpoint: The directory. One that stock Trainer saved, without manifest, is judged by its files' structure.
        full: Read every file and compare its digest; else presence and sizes alone.
        only: Patterns of the files to read, such as ``*.safetensors``; all if there are none.
    """
    try:
        manifest = read_manifest(checkpoint)
    except FileNotFoundError:
        return structural_problems(checkpoint)
    except (StateFileError, OSError) as error:
        return [str(error)]
    began = time.monotonic()
    listed = [entry for entry in manifest.files if _is_meant(entry.path, only)]

    def look(entry: FileEntry, advance: Callable[[int], None]) -> list[str]:
        return list(_problems_of_file(checkpoint, entry, advance if full else None))

    to_read = [entry.size if full else 0 for entry in listed]
    found = [one for each in on_cores(look, listed, to_read, advance) for one in each]
    if full and not found and not only:
        size, seconds = sum(entry.size for entry in manifest.files), time.monotonic() - began
        _verified[os.path.abspath(checkpoint)] = _written(checkpoint), Verified(len(manifest.files), size, seconds)
    return found


def recall(checkpoint: Path) -> Verified | None:
    """What this process has read of a checkpoint and found whole, as long as it has the same manifest."""
    written, found = _verified.get(os.path.abspath(checkpoint), (None, None))
    return found if written == _written(checkpoint) else None


def _written(checkpoint: Path) -> int:
    try:
        return manifest_path(checkpoint).stat().st_mtime_ns
    except OSError:
        return -1


def _is_meant(path: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch(path, pattern) for pattern in only)


def _problems_of_file(checkpoint: Path, entry: FileEntry, advance: Callable[[int], None] | None) -> Iterator[str]:
    path = checkpoint / entry.path
    if not leads_nowhere_else(checkpoint, path):
        yield f"{path}: a symbolic link to outside the checkpoint"
        return
    try:
        status = path.stat()
        size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            yield f"{path}: not a regular file"
        elif size != entry.size:
            yield f"{path}: {size} bytes, the manifest says {entry.size}"
        elif advance is not None and digest_file(path, advance) != entry.xxh3_128:
            yield f"{path}: digest differs from the manifest"
    except FileNotFoundError:
        yield f"{path}: a symbolic link to a file that does not exist" if path.is_symlink() else _missing(path)
    except OSError as error:
        yield f"{path}: cannot be read ({error.strerror})"


def _missing(path: Path) -> str:
    return f"{path}: missing"


def edits_in(checkpoint: Path) -> dict[str, str]:
    """What is wrong with the files that a person may have edited and that can still be read, by path."""
    manifest = manifest_if_readable(checkpoint)
    entries = () if manifest is None else manifest.files
    readable = [entry for entry in entries if _is_readable(checkpoint, entry.path)]
    found = ((entry.path, "; ".join(_problems_of_file(checkpoint, entry, lambda _: None))) for entry in readable)
    return {name: problem for name, problem in found if problem}


def _is_readable(checkpoint: Path, name: str) -> bool:
    """Whether a file is a text that people edit, and can be read: JSON parses."""
    path = PurePosixPath(name)
    if path.parts[0] == "lifecycle" or name.endswith(_OF_TENSORS) or path.suffix not in _TEXTS | {".json"}:
        return False
    try:
        if path.suffix != ".json":
            text = read_bounded(checkpoint / name).decode()
            return bool(text.strip()) and "\0" not in text
        return isinstance(read_json(checkpoint / name), dict) or path.name not in _OBJECTS
    except (OSError, ValueError, RecursionError):
        return False


def edited_files(checkpoint: Path, problems: Sequence[str]) -> tuple[str, ...]:
    """The files that were edited, where they are all of ``problems``; none where a checkpoint is damaged or intact."""
    edits = edits_in(checkpoint) if problems else {}
    return tuple(edits) if problems and set(problems) <= set(edits.values()) else ()


def deleted_files(checkpoint: Path, problems: Sequence[str]) -> tuple[str, ...]:
    """The files that are gone, where they are all of ``problems`` and the weights can be resumed from.

    Its manifest was written when all of them were there, so a person has deleted them, to save space.
    """
    manifest = manifest_if_readable(checkpoint) if problems else None
    if problems and manifest is None and list(problems) == lost_own_files(checkpoint):
        return (_OWN,)
    entries = () if manifest is None else manifest.files
    gone = {_missing(checkpoint / one.path): one.path for one in entries if _BESIDE_WEIGHTS.fullmatch(one.path)}
    return tuple(gone[one] for one in problems) if gone.keys() >= set(problems) else ()


def in_brief(checkpoint: Path, problems: Sequence[str]) -> str:
    """What is wrong with a checkpoint, in one line: of many problems three and their number; edits with the way on."""
    deleted = deleted_files(checkpoint, problems)
    if deleted == (_OWN,):
        return f"{_OWN} missing, which LifecycleCallback saves"
    if deleted:
        return f"{few(deleted)} deleted since it was saved"
    edited = edited_files(checkpoint, problems)
    if edited:
        return f"{few(edited)} edited since it was saved; {way_on(checkpoint)}"
    return few(problems, "; ")


def bytes_to_read(checkpoint: Path, only: Sequence[str] = ()) -> int:
    """How much :func:`problems_of` reads in full; 0 where no manifest says it."""
    manifest = manifest_if_readable(checkpoint)
    return 0 if manifest is None else sum(entry.size for entry in manifest.files if _is_meant(entry.path, only))


def verify(checkpoint: Path, *, only: Sequence[str] = (), progress: bool = True) -> list[str]:
    """As :func:`problems_of` in full, with a bar if ``progress`` is to be shown; at once where that was done before."""
    began, looks, place = time.time_ns(), _looks_of(checkpoint), os.path.realpath(checkpoint)
    if looks is not None and looks in (_whole.get((place, ())), _whole.get((place, tuple(only)))):
        return []
    with reading(f"verifying {checkpoint.name}", bytes_to_read(checkpoint, only), shown=progress) as advance:
        problems = problems_of(checkpoint, full=True, only=only, advance=advance)
    if looks is not None and not problems:
        has_settled = all(began - max(times) > _SETTLED_NS for _, _, _, *times in looks)
        if has_settled and looks == _looks_of(checkpoint):
            _whole[place, tuple(only)] = looks
    return problems


def forget() -> None:
    """Let :func:`verify` read everything again: what was read long ago proves nothing now."""
    _whole.clear()


def _looks_of(checkpoint: Path) -> Looks | None:
    """What tells without reading that no file was changed; None where even that cannot be seen."""
    try:
        found = [(str(path), path.stat()) for path in walk(checkpoint)]
    except OSError:
        return None
    return frozenset((path, one.st_ino, one.st_size, one.st_mtime_ns, one.st_ctime_ns) for path, one in found)
