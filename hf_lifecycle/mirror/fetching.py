"""Copies of checkpoints that are fetched from a mirror, and the newest checkpoint of a directory and its mirror.

Promise: a fetched checkpoint is staged, compared with its manifest, and committed as any other, so that a kill while it
is fetched leaves nothing that bears a checkpoint's name. Of several processes that ask at once, one fetches.
"""

from __future__ import annotations

import errno
import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_lifecycle.checkpoint.directory import admission, store
from hf_lifecycle.checkpoint.directory.listing import older_attempts
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.verification import edited_files, verify
from hf_lifecycle.checkpoint.files.durable import make_directories
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.errors import (
    DirectoryInUse,
    MirrorError,
    MirrorOfAnotherRun,
    NotEnoughSpace,
    NoUsableCheckpoint,
)
from hf_lifecycle.messages import way_on
from hf_lifecycle.mirror.places import Contents, Copy, Place, commit_copy, read_owner, write_owner
from hf_lifecycle.mirror.settings import Mirror

__all__ = ["Search", "contents_of", "fetch_copy", "room_for"]

logger = logging.getLogger("hf_lifecycle")

_POLL = 0.2  # seconds between two tries for the lock


def room_for(final: Path, size: int) -> Path:
    """Where a checkpoint that is fetched is staged; nothing is there, nor of another one that a kill interrupted.

    Raises:
        NotEnoughSpace: The disk has fewer than ``size`` bytes left.
    """
    folder = store.working_folder(final.parent, "fetching")
    for left in folder.iterdir():
        store.discard(left)
    free = shutil.disk_usage(final.parent).free
    if free < size:
        raise NotEnoughSpace(final.parent, size, free)
    return folder / final.name


def contents_of(mirror: Mirror, directory: Path) -> Contents:
    """What a mirror of the run in ``directory`` has.

    Raises:
        MirrorError: It cannot be reached, or belongs to another run.
    """
    with mirror.trouble():
        contents = mirror.open().look()
    Search(directory, mirror).require_same_run(contents)
    return contents


def fetch_copy(mirror: Mirror, directory: Path, step: int, attempt: str) -> bool:
    """Fetch one copy to the directory of one of several nodes. Returns whether it is there; why not, is logged.

    Raises:
        NotEnoughSpace: The disk is too full.
    """
    search = Search(directory, mirror)
    try:
        with mirror.trouble():
            place = mirror.open()
            contents = place.look()
    except MirrorError as error:
        logger.warning("%s", error)
        return False
    if contents.owner is not None and read_owner(directory) is None:
        write_owner(directory, contents.owner)
    copies = [copy for copy in contents.copies if (copy.step, copy.manifest.attempt) == (step, attempt)]
    with search.alone():
        return search.fetch(place, copies) is not None


class Search:
    def __init__(self, directory: Path, mirror: Mirror) -> None:
        self._directory = directory
        self._mirror = mirror
        self._damaged: list[str] = []  # what is wrong with what was skipped

    def run(self) -> str | None:
        seen = store.checkpoints_in(self._directory)
        here = self._newest_here()
        try:
            with self._mirror.trouble():
                place = self._mirror.open()
                contents = place.look()
            self.require_same_run(contents)
        except MirrorOfAnotherRun:
            raise
        except MirrorError as error:
            if here is None:
                raise
            logger.warning("%s; continuing with %s", error, here)
            return str(here)
        for problem in contents.unreadable:
            logger.warning("%s skipped: %s", self._mirror.shown, problem)
        self._damaged += contents.unreadable
        if self._newer(contents, here):
            with self.alone():
                if store.checkpoints_in(self._directory) != seen:  # another process has fetched it meanwhile
                    here = self._newest_here()
                here = self.fetch(place, self._newer(contents, here)) or here
        if here is None and self._damaged:
            raise NoUsableCheckpoint(self._directory, self._damaged)
        return str(here) if here is not None else None

    def _newest_here(self) -> Path | None:
        try:
            found = admission.latest_checkpoint(self._directory)
        except NoUsableCheckpoint as error:
            self._damaged += error.problems
            return None
        return Path(found) if found is not None else None

    def require_same_run(self, contents: Contents) -> None:
        """Raise where the mirror is another run's; a directory without run and checkpoints becomes one of its run."""
        known = read_owner(self._directory)
        if contents.owner is None or contents.owner == known:
            return
        if known is None and not store.checkpoints_in(self._directory):
            write_owner(self._directory, contents.owner)
            return
        raise MirrorOfAnotherRun(
            self._mirror.shown,
            f"it has the checkpoints of another run than {self._directory}; use one mirror for each run, or resume "
            "that run in an empty directory",
        )

    def _newer(self, contents: Contents, here: Path | None) -> list[Copy]:
        """The copies that are newer than what is here, newest first."""
        step = store.step_of(here) if here is not None else None
        newer = [copy for copy in contents.copies if step is None or copy.step > step]
        older = older_attempts(self._directory, (copy.manifest for copy in contents.copies))
        return [copy for copy in newer if copy.manifest.attempt not in older]

    def fetch(self, place: Place, copies: list[Copy]) -> Path | None:
        """The first of ``copies`` that arrives whole; what is wrong with others is told."""
        for copy in copies:
            try:
                return self._fetch_copy(place, copy)
            except MirrorError as error:
                self._damaged.append(f"{self._mirror.shown}/{copy.name}: {error.reason}")
                logger.warning("%s/%s skipped: %s", self._mirror.shown, copy.name, error.reason)
        return None

    def _fetch_copy(self, place: Place, copy: Copy) -> Path:
        if copy.problems:
            raise MirrorError(copy.name, "; ".join(copy.problems))
        size = sum(entry.size for entry in copy.manifest.files)
        final = self._directory / f"{store.PREFIX}{copy.step}"
        if final.exists() and edited_files(final, verify(final)):
            raise MirrorError(copy.name, f"not fetched, since the local copy was edited; {way_on(final)}")
        staged = room_for(final, size)
        try:
            with reading(f"fetching {final.name}", size) as advance, self._mirror.trouble():
                place.get(copy, staged, advance)
            if final.exists():
                logger.warning("%s is damaged; moved to %s", final, store.move_aside(final).name)
            commit_copy(staged, final, copy.manifest)
        except MirrorError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughSpace(self._directory, size, shutil.disk_usage(self._directory).free) from error
            raise
        finally:
            store.discard(staged)
        logger.info("%s: fetched from %s", final, self._mirror.shown)
        return final

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Only one process fetches into the directory; the others wait."""
        folder = store.hidden_folder(self._directory)
        make_directories(folder)
        lock, waits = DirectoryLock(folder / "fetch.lock"), False
        while True:
            try:
                lock.acquire()
                break
            except DirectoryInUse as error:
                if not waits:
                    logger.info("%s: waiting for %s, which is fetching a checkpoint", self._directory, error.holder)
                waits = True
                time.sleep(_POLL)
        try:
            yield
        finally:
            lock.release()
