"""The newest checkpoint of an output directory and its mirror; one that only the mirror has is fetched.

Promise: what is returned lies in the output directory and verifies, every byte of it. A fetched checkpoint is staged,
compared with its manifest, and committed as any other, so that a kill while it is fetched leaves nothing that bears a
checkpoint's name. Several processes may ask at once: one fetches, the others wait for it.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hf_lifecycle.argument_checks import read_path
from hf_lifecycle.checkpoint.directory import admission, store
from hf_lifecycle.checkpoint.directory.listing import older_attempts
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.verification import edited_files, verify
from hf_lifecycle.checkpoint.files.durable import make_directories
from hf_lifecycle.checkpoint.files.progress_bar import Reading
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

__all__ = ["latest_checkpoint", "newest_checkpoint"]

logger = logging.getLogger(__name__)

_POLL = 0.2  # seconds between two tries for the lock


def latest_checkpoint(
    directory: str | os.PathLike[str],
    *,
    mirror: str | os.PathLike[str] | Mirror | None = None,
    save_on_each_node: bool = False,
) -> str | None:
    """The newest checkpoint in ``directory`` of which every byte verifies; None if there is no checkpoint.

    Use ``trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))`` for the first start and for every later
    one. Each skipped checkpoint is logged with the reason.

    With several processes, call it on every rank. If ``torch.distributed`` is initialized, as it is after
    ``TrainingArguments`` or an ``Accelerator`` was created, rank 0 looks, and its answer or its error is that of every
    rank. Before that, each rank looks by itself; a training whose ranks found different checkpoints is refused.

    Args:
        directory: The output directory of the run.
        mirror: The mirror of its checkpoints. If it has a newer one, or the directory has no intact one, that one is
            fetched first. A mirror that cannot be reached is a warning if the directory has a checkpoint.
        save_on_each_node: Whether each node has a directory of its own, as with Trainer's argument of this name. The
            nodes then agree on a checkpoint that all of them have (see docs/elastic.md).

    Raises:
        NoCommonCheckpoint: The nodes have no intact checkpoint in common.
        NoUsableCheckpoint: All checkpoints are damaged. A silent fresh start would lose the run.
        NotADirectoryError: ``directory`` is a file.
        ValueError: ``directory`` is a checkpoint itself, or ``mirror`` is an unknown kind of URL.
        MirrorError: The mirror cannot be reached, and the directory has no checkpoint; or it belongs to another run.
        NotEnoughSpace: The disk is too full for the checkpoint to fetch.
        RankFailed: On other ranks, any of these on rank 0.
    """
    if "torch.distributed" not in sys.modules:  # which takes long to import, and cannot be up yet
        _require_one_process(is_asked=save_on_each_node)
        return newest_checkpoint(directory, mirror=mirror)
    from hf_lifecycle.processes.nodes import Nodes, is_first_of_node
    from hf_lifecycle.processes.ranks import Ranks

    ranks, found = Ranks.current(), None
    if save_on_each_node and ranks.world_size == 1:
        _require_one_process(is_asked=True)
    elif save_on_each_node and (nodes := Nodes.of(ranks, writes=is_first_of_node(ranks))).several:
        from hf_lifecycle.mirror.node_directories import agreed_checkpoint

        place = agreed_checkpoint(
            _place_of(directory), ranks, nodes, mirror=None if mirror is None else Mirror.of(mirror)
        )
        return None if place is None else str(place)
    with ranks.agree(what="looking for the newest checkpoint"):
        if ranks.is_main:
            found = newest_checkpoint(directory, mirror=mirror)
    answer: str | None = ranks.broadcast(found, what="the newest checkpoint")
    return answer


def newest_checkpoint(
    directory: str | os.PathLike[str], *, mirror: str | os.PathLike[str] | Mirror | None = None
) -> str | None:
    """As :func:`latest_checkpoint`, as this process sees it alone."""
    place = _place_of(directory)
    return admission.latest_checkpoint(place) if mirror is None else _Search(place, Mirror.of(mirror)).run()


def _require_one_process(*, is_asked: bool) -> None:
    if is_asked and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "save_on_each_node=True: the nodes cannot agree before torch.distributed is initialized; call "
            "latest_checkpoint() after TrainingArguments or an Accelerator was created"
        )


def _place_of(directory: str | os.PathLike[str]) -> Path:
    """The output directory, absolute."""
    place = Path(os.path.abspath(os.path.expanduser(read_path("directory", directory))))
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"directory: {place} is a file; give the output directory of the run")
    if manifest_path(place).is_file():
        raise ValueError(f"directory: {place} is one checkpoint; give its parent, {place.parent}")
    return place


class _Search:
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
            self._require_same_run(contents)
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
            with self._alone():
                if store.checkpoints_in(self._directory) != seen:  # another process has fetched it meanwhile
                    here = self._newest_here()
                here = self._fetch(place, self._newer(contents, here)) or here
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

    def _require_same_run(self, contents: Contents) -> None:
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

    def _fetch(self, place: Place, copies: list[Copy]) -> Path | None:
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
        staged = store.working_folder(self._directory, "fetching") / final.name
        store.discard(staged)
        free = shutil.disk_usage(self._directory).free
        if free < size:
            raise NotEnoughSpace(self._directory, size, free)
        try:
            with Reading(f"fetching {final.name}", size) as reading, self._mirror.trouble():
                place.get(copy, staged, reading.advance)
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
    def _alone(self) -> Iterator[None]:
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
