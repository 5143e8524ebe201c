"""How a loop's checkpoint comes to be: staged, committed by one rank, and older ones rotated away.

Promise: what was committed before is there whatever breaks off a save: one rank, all of them, or the machine. A save
has three steps, each called alone: :meth:`Saving.stage` finds a place and room for it, the caller lets every rank write
there, and :meth:`Saving.commit` flushes, writes the manifest and renames. All ranks see one file system.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from hf_lifecycle.checkpoint.admission import require_whole
from hf_lifecycle.checkpoint.durable import make_directories, sync_parents
from hf_lifecycle.checkpoint.events import EventLog
from hf_lifecycle.checkpoint.faults import annotate, as_errors_of_ranks, in_words
from hf_lifecycle.checkpoint.lock import DirectoryLock
from hf_lifecycle.checkpoint.manifest import FileEntry, Manifest, Metric, manifest_path
from hf_lifecycle.checkpoint.older_runs import found_at_begin
from hf_lifecycle.checkpoint.retention import CheckpointInfo, RetentionPolicy
from hf_lifecycle.checkpoint.rotation import rotate
from hf_lifecycle.checkpoint.space import require_space
from hf_lifecycle.checkpoint.store import (
    PREFIX,
    checkpoints_in,
    commit,
    hidden_folder,
    recover,
    staging_folder,
)
from hf_lifecycle.errors import NotEnoughSpace
from hf_lifecycle.mirror.courier import Courier
from hf_lifecycle.mirror.latest import newest_checkpoint
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.saving.captured import Save

__all__ = ["Saving", "Staged"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Staged:
    """A checkpoint that is being written.

    Attributes:
        folder: Where.
        final: Where it will be.
        step: Optimizer steps done.
        epoch: Epochs done.
        metric: What it is judged by.
        began: When the save began, of the monotonic clock.
    """

    folder: Path
    final: Path
    step: int
    epoch: int
    metric: Metric | None
    began: float


class Saving:
    """The checkpoints in the directory of one run.

    Args:
        directory: The run's directory, the same on every rank.
        ranks: The processes of the training.
        attempt: The name of this run of the program.
        keep: Which checkpoints are kept; None for all.
        mirror: To which committed checkpoints are copied; None for none.
    """

    def __init__(
        self, directory: Path, ranks: Ranks, attempt: str, keep: RetentionPolicy | None, mirror: Mirror | None = None
    ) -> None:
        self.directory = directory
        self.resumed_from: Path | None = None
        self._ranks = ranks
        self._attempt = attempt
        self._older: tuple[str, ...] | None = None  # what was there of other runs; known from the first save on
        self._keep = keep
        self._log = EventLog(directory)
        self._lock: DirectoryLock | None = None
        self._mirror = mirror
        self._courier: Courier | None = None  # on rank 0, while the directory is held

    def open(self) -> None:
        """Take the directory, and put right what a kill left in it. On every rank; done once.

        Raises:
            DirectoryInUse: Another run writes to it.
        """
        if self._lock is not None:
            return
        hidden = hidden_folder(self.directory)
        lock = DirectoryLock(hidden / "lock")
        with self._ranks.agree(what="taking the output directory"):
            if self._ranks.is_main:
                make_directories(hidden)
                sync_parents(self.directory)
                lock.acquire()
                self._recover(lock)
                if self._mirror is not None:
                    self._courier = Courier(self._mirror, self.directory, self.tell, keep=self._keep)
        self._lock = lock

    def _recover(self, lock: DirectoryLock) -> None:
        try:
            for sentence in recover(self.directory):
                logger.warning("%s: %s", self.directory, sentence)
                self.tell("recovered", None, why=sentence)
        except BaseException:
            lock.release()
            raise

    def newest(self) -> Path | None:
        """The newest checkpoint that verifies, from the mirror where only that has it; None where there is none.

        Raises:
            NoUsableCheckpoint: There are some, and all are damaged.
        """
        found = None
        with self._ranks.agree(what="looking for the newest checkpoint"):
            if self._ranks.is_main:
                found = newest_checkpoint(self.directory, mirror=self._mirror)
        found = self._ranks.broadcast(found, what="the newest checkpoint")
        return None if found is None else Path(found)

    def given(self, checkpoint: Path) -> Path:
        """``checkpoint``, which is not looked for but named, once all of it is verified.

        Raises:
            DamagedCheckpoint: It is not whole. On other ranks than the first: ``RankFailed``.
        """
        with self._ranks.agree(what=f"verifying {checkpoint}"):
            if self._ranks.is_main and (manifest_path(checkpoint).is_file() or not checkpoint.is_dir()):
                require_whole(checkpoint)
        return Path(os.path.abspath(checkpoint))

    def stage(self, step: int, epoch: int, metric: Metric | None) -> Staged:
        """Find a place for a checkpoint.

        Raises:
            NotEnoughSpace: The disk has no room for it.
            OSError: There is no such place.
        """
        self.open()
        began, final = time.monotonic(), self.directory / f"{PREFIX}{step}"
        folder = hidden_folder(self.directory) / "staging" / final.name
        with self._ranks.agree(what="preparing a save"):
            if self._ranks.is_main:
                with self._failures(step):
                    if self._older is None:
                        self._older = found_at_begin(self.directory, self.resumed_from)
                    self._require_space()
                    staging_folder(self.directory)
                    shutil.rmtree(folder, ignore_errors=True)
                    folder.mkdir()
        with self._ranks.agree(what="looking for the folder of a save"):
            if not folder.is_dir():
                raise FileNotFoundError(
                    f"{folder}: made by rank 0, and not there for rank {self._ranks.rank}: the directory must be on a "
                    "file system that all ranks share"
                )
        return Staged(folder, final, step, epoch, metric, began)

    def _require_space(self, unfinished: Path | None = None) -> None:
        last = next((path for _, path in checkpoints_in(self.directory)), self.resumed_from)
        require_space(self.directory, last, unfinished)

    @contextmanager
    def writing(self, staged: Staged) -> Iterator[None]:
        """Around the writing of every rank: what fails on one of them fails on all, and is removed."""
        what = f"writing {staged.final.name}"
        with (
            self._abandoned_on_failure(staged),
            self._ranks.agree(what=what, tell=lambda error: in_words(error, staged.folder)),
            as_errors_of_ranks(),
        ):
            yield

    @contextmanager
    def _abandoned_on_failure(self, staged: Staged) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self._ranks.removes_after(error):
                self._abandon(staged, error)
            raise

    def _abandon(self, staged: Staged, error: BaseException) -> None:
        """Remove what was written, and say why: that the disk is full, where it is, which no writer of torch's says."""
        lacking, why = None, in_words(error, staged.folder)
        try:
            if isinstance(error, Exception):
                self._require_space(staged.folder)
        except NotEnoughSpace as found:
            lacking, why = found, f"{type(found).__name__}: {found}"
        shutil.rmtree(staged.folder, ignore_errors=True)
        self.tell("failed", staged.step, why=why)
        said = f"{staged.final}: not saved: {why}"
        logger.error("%s", said)
        annotate(error, said)
        if lacking is not None:
            raise lacking from error

    def commit(self, staged: Staged) -> Path:
        """Make what was written a checkpoint, and remove those that are not kept. Returns where it is."""
        self.tell("saved", staged.step, seconds=time.monotonic() - staged.began, path=staged.final)
        with self._ranks.agree(what=f"committing {staged.final.name}"):
            if self._ranks.is_main:
                with self._abandoned_on_failure(staged):
                    self._commit(staged)
        logger.info("%s: saved step %d", staged.final, staged.step)
        return staged.final

    def commit_later(self, staged: Staged, hand_over: Callable[[], object] | None) -> Path:
        """As :meth:`commit`, but ``hand_over``, which rank 0 has, lets :meth:`commit_written` be called later.

        Returns where it will be.
        """
        with self._ranks.agree(what=f"committing {staged.final.name}"):
            if hand_over is not None:
                with self._abandoned_on_failure(staged):
                    hand_over()
        return staged.final

    def commit_written(self, staged: Staged, save: Save) -> int:
        """Commit what a thread has written, and remove what is not kept. Returns the bytes of the checkpoint.

        Invariant: it runs on that thread, and reads nothing that training moves.
        """
        size = self._commit(staged, save.known, stall_seconds=save.stall)
        logger.info("%s: saved step %d", staged.final, staged.step)
        return size

    def _commit(self, staged: Staged, known: Mapping[str, FileEntry] | None = None, **more: float) -> int:
        began = time.monotonic()
        manifest = commit(staged.folder, staged.final, lambda files: self._describe(staged, files), known)
        size, seconds = sum(entry.size for entry in manifest.files), time.monotonic() - began
        judged = None if staged.metric is None else staged.metric.value
        self.tell("committed", staged.step, seconds=seconds, bytes=size, **more, metric=judged, path=staged.final)
        self.copy(staged.final)
        self._rotate(staged.final)
        return size

    def copy(self, checkpoint: Path) -> None:
        """Let a committed checkpoint be copied to the mirror, where there is one; rank 0 alone does."""
        if (
            self._courier is not None
            and checkpoint.parent.resolve() == self.directory.resolve()
            and manifest_path(checkpoint).is_file()
        ):
            self._courier.offer(checkpoint, [] if self.resumed_from is None else [self.resumed_from])

    def _describe(self, staged: Staged, files: tuple[FileEntry, ...]) -> Manifest:
        return Manifest(
            attempt=self._attempt,
            step=staged.step,
            epoch=float(staged.epoch),
            world_size=self._ranks.world_size,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            metric=staged.metric,
            files=files,
            older=self._older or (),
        )

    def _rotate(self, newest: Path) -> None:
        if self._keep is None:
            return
        protected = [newest, *([self.resumed_from] if self.resumed_from is not None else [])]
        rotate(self.directory, self._keep, protected, self._tell_removed)

    def _tell_removed(self, info: CheckpointInfo) -> None:
        self.tell("removed", info.step, path=info.path, why=f"not kept by {self._keep!r}")

    def tell(self, event: str, step: int | None, **facts: str | int | float | Path | None) -> None:
        """Tell one event to the log; rank 0 alone does."""
        if self._ranks.is_main:
            self._log.write(event, step=step, **{name: self._plain(fact) for name, fact in facts.items()})

    def _plain(self, fact: str | int | float | Path | None) -> str | int | float | None:
        if isinstance(fact, Path):
            return fact.name if fact.parent == self.directory else str(fact)
        return round(fact, 6) if isinstance(fact, float) else fact

    @contextmanager
    def _failures(self, step: int) -> Iterator[None]:
        """Tell what breaks off a save within the block, and let it go on its way."""
        try:
            yield
        except BaseException as error:
            self.tell("failed", step, why=f"{type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Wait for the last copy to the mirror, and let others write to the directory."""
        if self._courier is not None:
            self._courier.close()
            self._courier = None
        if self._lock is not None and self._ranks.is_main:
            self._lock.release()
        self._lock = None
