"""A place that holds copies of checkpoints, as four verbs, and a folder as such a place.

Promise: a copy that :meth:`Place.look` lists has a manifest, which is written when all else is there and verified; a
torn copy is no copy. What is not of this package's making is never removed. Not promised: that two runs may use one
place; each place names the run that owns it, and whoever puts or fetches asks first.

A folder on a mounted drive keeps what its driver does: flushed here means handed to the driver, and a driver that
uploads later (Google Drive's) may not have done so yet.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.manifest import MANIFEST, FileEntry, Manifest, manifest_path, read_manifest
from hf_lifecycle.checkpoint.files.durable import write_atomically
from hf_lifecycle.checkpoint.files.regular import open_regular
from hf_lifecycle.errors import MirrorError, StateFileError

__all__ = [
    "OWNER",
    "Contents",
    "Copy",
    "FolderPlace",
    "Interrupted",
    "Place",
    "commit_copy",
    "copy_bytes",
    "copy_of",
    "parse_owner",
    "read_owner",
    "write_owner",
]

OWNER = ".lifecycle/run"  # names the run that a place, or an output directory, belongs to
_OWNER = re.compile(rb"[0-9a-f]{32}")
_BLOCK = 4 << 20

Check = Callable[[int], None]  # is told of bytes done, and raises where the work shall end


class Interrupted(Exception):
    """The work shall end before it is done."""


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a checkpoint.

    Attributes:
        name: What it is called there.
        problems: What presence and sizes tell to be wrong with it; nothing, if it is whole as far as they tell.
    """

    step: int
    name: str
    manifest: Manifest
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contents:
    """What a place holds.

    Attributes:
        owner: The run that it belongs to; None where it belongs to none.
        copies: The copies, newest first.
        unreadable: What is wrong with those whose manifest cannot be read.
    """

    owner: str | None
    copies: tuple[Copy, ...] = ()
    unreadable: tuple[str, ...] = ()


class Place(Protocol):
    """Where copies are. Whatever goes wrong is raised as the place's client raises it."""

    def look(self) -> Contents:
        """What there is, from names, sizes and manifests; no other file is read."""

    def put(self, source: Path, manifest: Manifest, owner: str, check: Check) -> Copy:
        """Copy the checkpoint ``source`` as ``manifest`` lists it, verify the copy, and commit it.

        What an earlier ``put`` or ``remove`` left unfinished is cleared away first. A copy of the same step that is
        there already stays until this one is committed.
        """

    def get(self, copy: Copy, target: Path, check: Check) -> None:
        """Read the files of ``copy``, no byte more than its manifest says, into the new folder ``target``."""

    def remove(self, copy: Copy) -> None:
        """Remove a copy; from the first moment on it is none any more."""


class FolderPlace:
    """A folder: a disk, or a mounted drive. Copies are staged, flushed and renamed as checkpoints are.

    Args:
        folder: The folder. It is made where it is missing, but not the folders above it: where those are missing, a
            drive is not mounted.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def look(self) -> Contents:
        self._require_parent()
        copies, unreadable = [], []
        for step, path in store.checkpoints_in(self._folder):
            try:
                copies.append(copy_of(step, path.name, read_manifest(path), store.problems_of(path, full=False)))
            except FileNotFoundError:
                continue  # it was never committed, or is another program's
            except StateFileError as error:
                unreadable.append(str(error))
        return Contents(read_owner(self._folder), tuple(copies), tuple(unreadable))

    def put(self, source: Path, manifest: Manifest, owner: str, check: Check) -> Copy:
        self._require_parent()
        if read_owner(self._folder) is None:
            write_owner(self._folder, owner)
        store.clear_left_overs(self._folder)
        name = f"{store.PREFIX}{manifest.step}"
        if (self._folder / name).exists() and not manifest_path(self._folder / name).exists():
            raise MirrorError(
                self._folder / name, "exists and has no manifest, so hf_lifecycle did not write it; move it away"
            )
        staged = store.staging_folder(self._folder) / name
        for entry in manifest.files:
            copy_bytes(open_regular(source / entry.path), staged / entry.path, entry.size, check)
        commit_copy(staged, self._folder / name, manifest)
        return Copy(manifest.step, name, manifest)

    def get(self, copy: Copy, target: Path, check: Check) -> None:
        for entry in copy.manifest.files:
            copy_bytes(open_regular(self._folder / copy.name / entry.path), target / entry.path, entry.size, check)

    def remove(self, copy: Copy) -> None:
        store.remove(self._folder / copy.name)

    def _require_parent(self) -> None:
        if not self._folder.parent.is_dir():
            raise FileNotFoundError(f"{self._folder.parent} does not exist; mount the drive, or create that folder")


def copy_of(step: int, name: str, manifest: Manifest, problems: Sequence[str]) -> Copy:
    """The copy called ``name``, which its manifest must bear out.

    Raises:
        StateFileError: The manifest is another step's, or lists a file where a folder of another file would be.
    """
    files = {PurePosixPath(entry.path) for entry in manifest.files}
    if both := files & {folder for path in (*files, MANIFEST) for folder in path.parents}:
        raise StateFileError(f"{name}/{MANIFEST}", f"{min(both)} is listed as a file and as a folder")
    if manifest.step != step:
        raise StateFileError(f"{name}/{MANIFEST}", f"is that of step {manifest.step}")
    return Copy(step, name, manifest, tuple(problems))


def copy_bytes(source: IO[bytes], target: Path, size: int, check: Check) -> None:
    """Write the first ``size`` bytes of ``source``, which is closed then, to the new file ``target``.

    Raises:
        MirrorError: The source has fewer or more.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with source, open(target, "xb") as file:
        left = size
        while left and (block := source.read(min(_BLOCK, left))):
            file.write(block)
            left -= len(block)
            check(len(block))
        if left or source.read(1):
            raise MirrorError(target.name, f"{'shorter' if left else 'longer'} than the {size} bytes of the manifest")


def commit_copy(staged: Path, final: Path, manifest: Manifest) -> None:
    """Flush what was copied to ``staged``, read all of it, compare it with ``manifest``, and make it ``final``.

    Raises:
        MirrorError: A file differs. Nothing was committed.
    """

    def verified(found: tuple[FileEntry, ...]) -> Manifest:
        known = {entry.path: entry for entry in found}
        wrong = [entry.path for entry in manifest.files if known.pop(entry.path, None) != entry]
        if wrong or known:
            raise MirrorError(final.name, f"the copy differs from the manifest in {', '.join([*wrong, *known])}")
        return manifest

    try:
        store.commit(staged, final, verified)
    except MirrorError:
        store.discard(staged)
        raise


def read_owner(directory: Path) -> str | None:
    """The run that a folder belongs to; None where none is named.

    Raises:
        StateFileError: The file that names it is damaged.
    """
    path = directory / OWNER
    try:
        with open_regular(path) as file:
            return parse_owner(path, file.read(64))
    except FileNotFoundError:
        return None


def parse_owner(path: str | os.PathLike[str], text: bytes) -> str:
    """The name of a run as a place tells it.

    Raises:
        StateFileError: It is none.
    """
    if not _OWNER.fullmatch(text.strip()):
        raise StateFileError(path, "does not name a run; remove that file only if no other run uses this mirror")
    return text.strip().decode()


def write_owner(directory: Path, owner: str) -> None:
    """Let a folder belong to a run."""
    path = store.hidden_folder(directory)
    store.working_folder(directory, "staging")
    write_atomically(path / Path(OWNER).name, lambda file: file.write(owner.encode() + b"\n"))
