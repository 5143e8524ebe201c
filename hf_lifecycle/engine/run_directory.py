"""The output directory of one run: who holds it, what is told in it, copied from it and removed; for every host.

Promise: rank 0 alone holds, tells, copies and removes; all ranks see one file system, or the run does not begin. Where
each node has a directory of its own, its first rank does so there, but rank 0 alone copies to the mirror.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.listing import found_at_begin, rotate
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.place_of_save import require_space, size_of
from hf_lifecycle.checkpoint.directory.retention import CheckpointInfo, RetentionPolicy
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, recover
from hf_lifecycle.engine.directory_access import lock_directory, require_directories
from hf_lifecycle.engine.failure_policy import FailurePolicy
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.mirror.worker import MirrorWorker
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["RunDirectory"]

logger = logging.getLogger("hf_lifecycle")


class RunDirectory:
    """The checkpoints of one run.

    Args:
        given: The directory, as the user gave it; the same on every rank of a node. A relative path is resolved once.
        nodes: Which of them share the directory; default: all.
        keep: Which checkpoints are kept; None for all.
        mirror: To which committed checkpoints are copied; None for none.
        failures: Says whether training continues when a save fails.
        recovers: Whether what a kill left is put right when the directory is taken; else somebody has done it before.
        tells: Whether this process tells events; default: rank 0 does, or the first rank of each node.

    Attributes:
        path: The directory, absolute. Invariant: whatever this package writes goes there, wherever the working
            directory is by then.
        resumed_from: The checkpoint that the run resumed from; it is kept until there is a newer one.
    """

    def __init__(
        self,
        given: str | os.PathLike[str],
        ranks: Ranks,
        *,
        nodes: Nodes | None = None,
        keep: RetentionPolicy | None = None,
        mirror: Mirror | None = None,
        failures: FailurePolicy | None = None,
        recovers: bool = False,
        tells: bool | None = None,
    ) -> None:
        self._given = Path(given)
        self.path = Path(os.path.abspath(given))
        self.failures = FailurePolicy() if failures is None else failures
        self.resumed_from: Path | None = None
        self._needed: tuple[Path, ...] = ()  # what the host may load once more
        self.ranks = ranks
        self.nodes = Nodes(ranks.rank) if nodes is None else nodes
        self._keep = keep
        self._log = EventLog(self.path) if (self.nodes.leads if tells is None else tells) else None
        self._size: int | None = None  # of the last checkpoint that was committed
        self._took: deque[float] = deque(maxlen=5)  # seconds of the last saves
        self._older: tuple[str, ...] | None = None  # what was there of other runs when this one began
        self._is_in_place = False  # whether the host has written checkpoints itself
        self._recovers = recovers
        self._is_open = False
        self._lock: DirectoryLock | None = None
        self._mirror = mirror
        self._worker: MirrorWorker | None = None  # on rank 0, while the directory is held

    @property
    def older(self) -> tuple[str, ...]:
        """What was there of other runs when this one began."""
        return self._older or ()

    @property
    def is_open(self) -> bool:
        """Whether the run has begun to use it."""
        return self._is_open

    def is_at(self, folder: str | os.PathLike[str]) -> bool:
        """Whether ``folder``, by whatever name, is this directory."""
        return Path(folder) == self._given or Path(os.path.abspath(folder)) == self.path

    def resolved(self, checkpoint: str | os.PathLike[str]) -> Path:
        """A checkpoint that is named by the directory as the user gave it, by its absolute path."""
        path = Path(checkpoint)
        return self.path / path.name if path.parent == self._given else path

    # Events

    def tell(self, event: str, step: int | None, **facts: str | int | float | Path | None) -> None:
        """Tell one event to the log. Paths within the directory are told as they are called there."""
        if self._log is not None:
            self._log.write(event, step=step, **{name: self._plain(fact) for name, fact in facts.items()})

    def _plain(self, fact: str | int | float | Path | None) -> str | int | float | None:
        if isinstance(fact, Path):
            return fact.name if fact.parent == self.path else str(fact)
        return round(fact, 6) if isinstance(fact, float) else fact

    # The directory

    def open(self, *, takes: bool = True) -> None:
        """See that all ranks, or those of each node, have one directory, and take it. On every rank; done once.

        Args:
            takes: Whether it is taken now, and not by the first save.

        Raises:
            DirectoryInUse: Another run writes to it. On other ranks than the first: ``RankFailed``.
            UnsupportedTraining: The ranks do not have one directory in common, or two nodes have.
            ValueError: The mirror is the directory itself.
        """
        if self._is_open:
            return
        require_directories(self.path, self.ranks, self.nodes)
        with self.ranks.agree(what="taking the output directory"):
            if self._mirror is not None:
                self._mirror.require_apart(self.path)
            if takes:
                self._take()
        self._is_open = True

    def _take(self) -> None:
        if self._lock is not None or not self.nodes.leads:
            return
        lock = lock_directory(self.path)
        try:
            for sentence in recover(self.path) if self._recovers else ():
                logger.warning("%s: %s", self.path, sentence)
                self.tell("recovered", None, why=sentence)
        except BaseException:
            lock.release()
            raise
        self._lock = lock
        if self._mirror is not None and self.ranks.is_main:
            if why := self._mirror.why_not_there:
                logger.warning("no checkpoint is copied to %s until that is changed: %s", self._mirror.shown, why)
            self._worker = MirrorWorker(self._mirror, self.path, self.tell, keep=self._keep)
            self._copy_resumed()

    def begin(self, resumed_from: Path | None, *, may_again: bool = False) -> None:
        """The run begins, anew or from a checkpoint; what lies there of other runs is looked for, and said.

        Args:
            resumed_from: The checkpoint.
            may_again: Whether the host may resume from it once more, later in this run. Then it is never removed.
        """
        self.resumed_from = resumed_from
        self._needed = () if resumed_from is None or not may_again else (resumed_from,)
        self._older = found_at_begin(self.path, resumed_from) if self.nodes.leads else ()
        self._copy_resumed()

    def _copy_resumed(self) -> None:
        """Let the checkpoint that is resumed from be copied, where the run before had no time for it."""
        found = self.resumed_from
        if (
            found is not None
            and self._worker is not None
            and found.parent.resolve() == self.path.resolve()
            and manifest_path(found).is_file()
        ):
            self._worker.offer(found, [found])

    def leave_to_host(self, *, keeps: bool) -> None:
        """Checkpoints are written in place, by the host; of what it does not do, the user is told.

        Args:
            keeps: Whether the host removes those that are not kept.
        """
        if self._keep is not None and not keeps:
            logger.warning("keep has no effect: checkpoints are written in place here, and none is removed")
        if self.failures.may_go_on:
            logger.warning(
                "on_save_failure has no effect: checkpoints are written in place here, and a failed save "
                "ends the training"
            )

    def saved_in_place(self, step: int, checkpoint: Path) -> None:
        """Tell of a checkpoint that the host has written in place."""
        self.tell("saved", step, path=checkpoint)
        self._is_in_place = True
        self.failures.ended(checkpoint, is_whole=True)
        logger.info("%s: saved step %d", checkpoint, step)

    def finish_copies(self) -> None:
        """Wait for the last copy to the mirror, as long as its settings say."""
        if self._worker is not None:
            self._worker.close()
        if self._mirror is not None and self._is_in_place:
            logger.warning("mirror: checkpoints were written in place, so none was copied to %s", self._mirror.shown)

    def close(self, *, wait: bool = True) -> None:
        """Let others write to the directory. ``wait``: for the last copy to the mirror, which continues otherwise."""
        if self._worker is not None:
            self._worker.close(None if wait else 0)
            self._worker = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        self._is_open = False

    # For a save

    def require_ready(self) -> None:
        """See, on rank 0, that a save can begin: the directory is taken, and has room.

        Raises:
            DirectoryInUse: Another run writes to it.
            NotEnoughSpace: The disk has no room for another checkpoint.
        """
        self._take()
        if self._older is None:
            self.begin(self.resumed_from)
        self.require_space()

    def require_space(self, unfinished: Path | None = None) -> None:
        """Raise ``NotEnoughSpace`` where the disk has no room for another checkpoint beside ``unfinished``."""
        if self._size is None:
            last = next((path for _, path in checkpoints_in(self.path)), self.resumed_from)
            self._measure(last)
        require_space(self.path, self._size, unfinished)

    @property
    def slowest_save(self) -> float | None:
        """Seconds that the slowest of the last saves took, from its begin to its commit, on rank 0; None before one."""
        return max(self._took, default=None)

    def added(self, checkpoint: Path, protected: Sequence[Path], seconds: float) -> None:
        """A checkpoint was committed, after ``seconds``: let it be copied, and remove what is not to be kept.

        Where there are several nodes, :meth:`remove_unkept` is called when all of them have committed.
        """
        self._took.append(seconds)
        self._measure(checkpoint)
        if self._worker is not None:
            self._worker.offer(checkpoint, [*protected, *self._needed])
        if not self.nodes.several:
            self.remove_unkept(checkpoint, protected)

    def remove_unkept(self, checkpoint: Path, protected: Sequence[Path]) -> None:
        """Remove what is not to be kept, now that ``checkpoint`` is committed."""
        if self._keep is not None:
            # Invariant: the one just committed stays, whatever an earlier run with more steps left in the directory.
            rotate(self.path, self._keep, [checkpoint, *protected, *self._needed], self._tell_removed)

    def removes_after(self, error: BaseException) -> bool:
        """Whether this rank removes what a failed save has left in the directory."""
        if self.nodes.several:
            return self.nodes.leads and isinstance(error, Exception)
        return self.ranks.removes_after(error)

    def _measure(self, checkpoint: Path | None) -> None:
        with suppress(OSError):  # the save itself will say what is wrong
            self._size = None if checkpoint is None else size_of(checkpoint)

    def _tell_removed(self, info: CheckpointInfo) -> None:
        self.tell("removed", info.step, path=info.path, why=f"not kept by {self._keep!r}")
