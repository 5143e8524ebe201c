"""A directory of checkpoints: how one is committed, replaced, moved aside and removed, and what a kill leaves of that.

Promise: no torn directory ever bears the name ``checkpoint-N``. A checkpoint is written in a hidden folder, flushed,
given its manifest, and renamed into place; what is replaced or removed goes after what is new has come. At any kill,
the checkpoints that were committed before are there after :func:`recover`. Where a rename is not atomic (FUSE, object
stores), the manifest tells a whole checkpoint from a torn one.

Not promised: protection from a second writer; that is :mod:`hf_lifecycle.checkpoint.directory.lock`'s.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.checkpoint.directory.manifest import FileEntry, Manifest, can_be_listed, files_below, manifest_path
from hf_lifecycle.checkpoint.directory.verification import (
    deleted_files,
    edited_files,
    edits_in,
    in_brief,
    problems_of,
    verify,
)
from hf_lifecycle.checkpoint.directory.without_manifest import may_be_checkpoint
from hf_lifecycle.checkpoint.files.durable import flush, make_directories, sync_directory, write_atomically
from hf_lifecycle.checkpoint.files.regular import digest_file

__all__ = [
    "asides_of",
    "checkpoints_in",
    "clear_left_overs",
    "commit",
    "discard",
    "hidden_folder",
    "move_aside",
    "moved_aside",
    "no_checkpoints_in",
    "problems_of",
    "recover",
    "remove",
    "staging_folder",
    "step_of",
    "working_folder",
]

logger = logging.getLogger(__name__)

PREFIX = "checkpoint-"
PARTS = "parts"  # where ranks tell each other what they have written of a checkpoint
_ASIDE = "damaged-"
_NAME = re.compile(r"checkpoint-(\d+)")
_HIDDEN = ".lifecycle"
_FLUSHES = 8  # at once


def hidden_folder(directory: Path) -> Path:
    """Where this package keeps what is not, or no more, a checkpoint: the lock, unfinished and replaced ones.

    Where there is a file of that name, which is somebody else's, the folder has another.
    """
    folder = directory / _HIDDEN
    return folder.with_name(f"{_HIDDEN}.d") if folder.is_file() and not folder.is_symlink() else folder


def staging_folder(directory: Path) -> Path:
    """Where a checkpoint is written before it is one; made where it is missing.

    Raises:
        NotADirectoryError: It is a link, and might lead anywhere.
    """
    return working_folder(directory, "staging")


def working_folder(directory: Path, name: str) -> Path:
    """A folder of the hidden folder, made where it is missing.

    Raises:
        NotADirectoryError: It is a link, and might lead anywhere.
    """
    folder = hidden_folder(directory) / name
    if _is_linked(folder):
        raise NotADirectoryError(errno.ENOTDIR, "a symbolic link, which is not followed; remove it", str(folder))
    make_directories(folder)
    return folder


def _replaced_folder(directory: Path) -> Path:
    return hidden_folder(directory) / "replaced"


def checkpoints_in(directory: Path) -> list[tuple[int, Path]]:
    """Every checkpoint with its N of ``checkpoint-N``, newest first. Whether they are intact is not asked here."""
    return [(step, path) for step, path in _named_like_checkpoints(directory) if may_be_checkpoint(path)]


def no_checkpoints_in(directory: Path) -> list[tuple[int, Path]]:
    """What is called ``checkpoint-N`` and never was a checkpoint, as :func:`checkpoints_in`."""
    return [(step, path) for step, path in _named_like_checkpoints(directory) if not may_be_checkpoint(path)]


def _named_like_checkpoints(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(((int(name[1]), path) for name, path in named if name and path.is_dir()), reverse=True)


def step_of(checkpoint: Path) -> int | None:
    """The N of a ``checkpoint-N``; None for any other name."""
    name = _NAME.fullmatch(checkpoint.name)
    return int(name[1]) if name else None


def commit(
    staged: Path,
    final: Path,
    describe: Callable[[tuple[FileEntry, ...]], Manifest],
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Make the checkpoint that lies in ``staged`` the checkpoint ``final``.

    Args:
        staged: A directory on the same file system; nobody writes to it any more.
        final: Its name to be. One that is there already is replaced.
        describe: Makes the manifest of the files.
        known: The files, by path, that are on the disk already and whose digests were taken as they were written. If
            given, no thread is started: an interpreter that ends admits none.

    Raises:
        OSError: A flush, the manifest or a rename failed. ``final`` is what it was before.
    """
    paths = list(files_below(staged))
    manifest_path(staged).parent.mkdir(exist_ok=True)
    folders = [Path(folder) for folder, _, _ in os.walk(staged)]
    if known is None:
        # A flush waits for the disk; meanwhile the digests are taken from memory. A file system writes its journal for
        # several flushes at once where they come at once; one after the other, small files cost more than the large.
        with ThreadPoolExecutor(_FLUSHES, thread_name_prefix="hf_lifecycle-flush") as disk:
            flushed = [disk.submit(flush, path) for path in paths]
            entries = _entries_of(staged, paths, {})
            for done in flushed:
                done.result()
            list(disk.map(sync_directory, folders))
    else:
        entries = _entries_of(staged, paths, known)
        for path in paths:
            if path.relative_to(staged).as_posix() not in known:
                flush(path)
        for folder in folders:
            sync_directory(folder)
    manifest = describe(entries)
    # Invariant: last. Whatever has a manifest is on the disk whole.
    write_atomically(manifest_path(staged), lambda file: file.write(manifest.to_json()))
    _move_into_place(staged, final)
    return manifest


def _entries_of(staged: Path, paths: Sequence[Path], known: Mapping[str, FileEntry]) -> tuple[FileEntry, ...]:
    entries = []
    for path in paths:
        name = path.relative_to(staged).as_posix()
        if name in known:
            entries.append(known[name])
        elif can_be_listed(name):
            entries.append(FileEntry(name, path.stat().st_size, digest_file(path)))
        else:
            logger.warning("%s: left out of the manifest, since its name is a different path on another system", path)
    return tuple(entries)


def _move_into_place(staged: Path, final: Path) -> None:
    aside = kept = None
    if final.exists() and edits_in(final):
        aside = kept = move_aside(final)  # it holds what a person wrote
        logger.warning("%s: replaced by this run; the edited checkpoint is kept as %s", final, kept.name)
    elif final.exists():
        # Invariant: never remove a target to rename onto it. A kill between the two renames is mended by recover().
        aside = _replaced_folder(final.parent) / final.name
        make_directories(aside.parent)
        discard(aside)
        os.rename(final, aside)
    try:
        os.rename(staged, final)
        try:
            sync_directory(final.parent)
        except OSError:
            os.rename(final, staged)
            raise
    except OSError:
        if aside is not None:
            os.rename(aside, final)
        raise
    if aside is not None and kept is None:
        discard(aside)


def discard(path: Path) -> None:
    """Remove a directory with all that is in it, or a file, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint; at no instant is a part of it left under its name."""
    aside = _replaced_folder(checkpoint.parent).with_name("removed") / checkpoint.name
    make_directories(aside.parent)
    discard(aside)
    os.rename(checkpoint, aside)
    discard(aside)


def recover(directory: Path, *, progress: bool = True) -> list[str]:
    """Put right what a kill left behind; call it with the directory's lock held. Returns what was done, in sentences.

    Unfinished checkpoints are removed: they never were checkpoints. One that was about to be replaced is restored.
    Damaged ones are renamed to ``damaged-checkpoint-N`` and never removed; none that is whole is touched, nor one in
    which a person has edited what people read, or deleted what weights can do without.
    """
    wait_for(directory)
    done = clear_left_overs(directory)
    for _, path in checkpoints_in(directory):
        problems = verify(path, progress=progress)
        if not problems:
            break  # older ones are not read: they are looked at when they are needed
        brief = in_brief(path, problems)
        if deleted_files(path, problems):
            done.append(f"{path.name} is left where it is: {brief}")
            break
        if edited_files(path, problems):
            done.append(f"{path.name} is left where it is, and not resumed from: {brief}")
        else:
            done.append(f"{path.name} is damaged ({brief}); moved to {move_aside(path).name}")
    if done:
        sync_directory(directory)
    return done


def clear_left_overs(directory: Path) -> list[str]:
    """Remove what commits and removals left that a kill interrupted; what was about to be replaced is restored."""
    done = []
    for left in _entries(_replaced_folder(directory)):
        if os.path.lexists(directory / left.name) or not _NAME.fullmatch(left.name):
            discard(left)
        else:
            os.rename(left, directory / left.name)
            done.append(f"{left.name} was being replaced when the last run was interrupted; restored")
    for folder in ("removed", PARTS):
        for left in _entries(hidden_folder(directory) / folder):
            discard(left)
    for left in _entries(hidden_folder(directory) / "staging"):
        discard(left)
        done.append(f"{left.name} was not complete when the last run was interrupted; removed")
    return done


def asides_of(checkpoint: Path) -> list[Path]:
    """What :func:`move_aside` has made of a checkpoint of this name."""
    name = re.compile(rf"{_ASIDE}{re.escape(checkpoint.name)}(\.\d+)?")
    return [path for path in moved_aside(checkpoint.parent) if name.fullmatch(path.name)]


def moved_aside(directory: Path) -> list[Path]:
    """The damaged checkpoints that :func:`move_aside` renamed."""
    return sorted(path for path in directory.glob(f"{_ASIDE}{PREFIX}*") if path.is_dir())


def move_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint to a free ``damaged-checkpoint-N``, which no one resumes from. Returns its name."""
    aside = _free_name(checkpoint.with_name(f"{_ASIDE}{checkpoint.name}"))
    os.rename(checkpoint, aside)
    return aside


def _entries(folder: Path) -> list[Path]:
    # Invariant: what recover() removes lies in the directory. A folder that is a link could name any other.
    return sorted(folder.iterdir()) if folder.is_dir() and not _is_linked(folder) else []


def _is_linked(folder: Path) -> bool:
    """Whether a folder of the hidden folder, or that one itself, is a link."""
    return folder.is_symlink() or folder.parent.is_symlink()


def _free_name(wanted: Path) -> Path:
    names = (wanted if not n else wanted.with_name(f"{wanted.name}.{n}") for n in range(10_000))
    return next(name for name in names if not os.path.lexists(name))
