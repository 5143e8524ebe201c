"""One save, from its begin until its checkpoint is there, or it is given up; the same for every host.

Each rank has one, and all ranks take it through the same states::

    BEGUN ── stage ── STAGED ── writing ── WRITTEN ──┬── commit ──────── COMMITTED
                                                     └── commit_later ── HANDED_OVER ── commit_written, on a thread
    any of the first three ── an error leaves the block ── GIVEN_UP: what was written is removed, and why is said

Promise: what was committed before is there whatever breaks a save off: one rank, all of them, or the machine. What
fails on one rank fails on all. What threads do fails on all at the next save: each rank tells then how the one before
ended. ``commit_written`` runs on the writer's thread: it makes no exchange with other ranks, and reads nothing that
training moves.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from types import TracebackType

from hf_lifecycle.checkpoint.directory.manifest import FileEntry, Manifest, files_below
from hf_lifecycle.checkpoint.directory.place_of_save import adopt_files
from hf_lifecycle.checkpoint.directory.store import PARTS, PREFIX, commit, hidden_folder, staging_folder
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.checkpoint.files.write_errors import as_errors_of_ranks, file_at_fault, in_words
from hf_lifecycle.engine.rank_parts import RankParts
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.errors import NotEnoughSpace, RankFailed, RankUnreachable
from hf_lifecycle.processes.file_transfer import FileTransfer
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.processes.verdicts import Told
from hf_lifecycle.saving.captured import Save

__all__ = ["SaveSession"]

logger = logging.getLogger("hf_lifecycle")


class SaveState(Enum):
    """Where a save is."""

    BEGUN = "begun"
    STAGED = "staged"
    WRITTEN = "written"
    COMMITTED = "committed"
    HANDED_OVER = "handed over"
    GIVEN_UP = "given up"


class SaveSession:
    """A block in which one checkpoint is made, on every rank.

    An error that leaves the block is raised as it is, or as ``NotEnoughSpace`` where that is why; where the policy lets
    training continue over it, the block ends without one, and :attr:`state` is ``GIVEN_UP``.

    Args:
        put_back: Called when the save is given up: puts back what was before it.
        is_best: Whether these are the best weights so far, for the log.

    Attributes:
        folder: Where the checkpoint is written.
        parts: What ranks tell of it that write a part of it on a thread.
        final: Where it will be.
        began: When it began, by the monotonic clock.
    """

    def __init__(
        self,
        directory: RunDirectory,
        step: int,
        *,
        put_back: Callable[[], object] | None = None,
        is_best: bool = False,
    ) -> None:
        name = f"{PREFIX}{step}"
        self.state = SaveState.BEGUN
        self.step = step
        self.final = directory.path / name
        self.folder = hidden_folder(directory.path) / "staging" / name
        self.parts = RankParts(hidden_folder(directory.path) / PARTS / name, name, directory.ranks)
        self._directory = directory
        self._ranks = directory.ranks
        self._put_back = put_back
        self._is_best = is_best
        self.began = time.monotonic()

    def __enter__(self) -> SaveSession:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: TracebackType | None) -> bool:
        if error is None:
            return False
        reason = self._give_up(error)
        if reason is not None and reason is not error:
            raise reason from error
        return reason is None

    def stage(self) -> None:
        """Find a place for the checkpoint.

        Raises:
            NotEnoughSpace: The disk has no room for it.
            OSError: There is no such place.
        """
        with self._ranks.agree(what="making room for a checkpoint"):
            self.place()

    def place(self) -> None:
        """As :meth:`stage`, within a block that the ranks agree on. Raises the same."""
        if self._directory.nodes.leads:
            self._directory.require_ready()
            staging_folder(self._directory.path)
            shutil.rmtree(self.folder, ignore_errors=True)
            self.parts.remove()
            self.folder.mkdir()
        self.state = SaveState.STAGED

    def cancel(self, error: Exception) -> None:
        """Nothing was written, and is going to be: ``error`` is of something else, and its finder says so."""
        self._clear_after(error)
        self.state = SaveState.GIVEN_UP

    @contextmanager
    def writing(self) -> Iterator[Told]:
        """Around the writing of every rank; gives what they tell each other of it."""

        def in_short(error: BaseException) -> str:
            return in_words(self._cause(error), self.folder, found_in=error)

        with self._ranks.agree(what=f"saving {self.final.name}", tell=in_short) as told, as_errors_of_ranks():
            yield told
        self.state = SaveState.WRITTEN

    def commit(self, manifest: Manifest, protected: Sequence[Path] = ()) -> None:
        """Make what every rank has written a checkpoint, and remove those that are not kept.

        Args:
            manifest: What its manifest says beside its files.
            protected: Checkpoints that are kept whatever the policy says.
        """
        self._tell_saved()
        nodes = self._directory.nodes
        if nodes.several:
            _give_each_node_all(self.folder, nodes, self._ranks)
        with self._ranks.agree(what=f"committing {self.final.name}"):
            if nodes.leads:
                self._commit(manifest, protected)
        self.state = SaveState.COMMITTED
        if nodes.several and nodes.leads:
            # Invariant: after the commits of all nodes, so that whenever one is killed, all have a step in common.
            self._directory.remove_unkept(self.final, protected)
        self._directory.failures.ended(self.final, is_whole=True)

    def commit_later(self, hand_over: Callable[[], object] | None, *, is_written: bool = False) -> None:
        """As :meth:`commit`, where threads do what is left; every rank knows that they do.

        Args:
            hand_over: Lets :meth:`commit_written` be called once all is written, and proved; None on a rank that has
                written its part. Invariant: what goes wrong in it is found with what goes wrong in the thread, since
                it is no exchange.
            is_written: Whether the host has written everything, so that it is only to be proved.
        """
        if is_written:
            self._tell_saved()
        if hand_over is None:
            self._directory.failures.ended(self.final, is_whole=True)
        else:
            hand_over()
        self.state = SaveState.HANDED_OVER

    def commit_written(self, save: Save, manifest: Manifest, protected: Sequence[Path] = ()) -> int:
        """Commit what a thread has written. Returns the bytes of the checkpoint."""
        return self._commit(manifest, protected, save.known, stall_seconds=save.stall)

    def _tell_saved(self) -> None:
        self._directory.tell("saved", self.step, seconds=time.monotonic() - self.began, path=self.final)

    def _commit(
        self,
        manifest: Manifest,
        protected: Sequence[Path],
        known: Mapping[str, FileEntry] | None = None,
        **more: float,
    ) -> int:
        began, adopted = time.monotonic(), adopt_files(self.final, self.folder)

        def describe(files: tuple[FileEntry, ...]) -> Manifest:
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            listed = tuple(file for file in files if file.path not in adopted)
            return replace(manifest, files=listed, created=now, older=self._directory.older)

        committed = commit(self.folder, self.final, describe, known)
        size = sum(entry.size for entry in committed.files)
        facts = {"seconds": time.monotonic() - began, "bytes": size, **more}
        metric = None if manifest.metric is None else manifest.metric.value
        self._directory.tell("committed", self.step, **facts, metric=metric, path=self.final)
        logger.info("%s: saved step %d", self.final, self.step)
        self._directory.added(self.final, protected, time.monotonic() - self.began)
        return size

    def _give_up(self, error: BaseException) -> BaseException | None:
        """Remove what was written, and say why. Returns what to raise, if anything."""
        if self._put_back is not None:
            self._put_back()
        self.parts.abandon(error)
        cause, file = error, None
        if self.state is not SaveState.BEGUN:
            cause, file = self._cause(error), file_at_fault(error, self.folder)
            self._clear_after(error)
        self.state = SaveState.GIVEN_UP
        why = f"{type(cause).__name__}: {cause}"
        self._directory.tell("failed", self.step, why=why if file is None else f"{file}: {why}")
        survived = self._directory.failures.is_survived(cause, self.final, file, self._ranks, is_best=self._is_best)
        return None if survived else cause

    def _clear_after(self, error: BaseException) -> None:
        if self._directory.removes_after(error):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _cause(self, error: BaseException) -> BaseException:
        """That the disk is full, where it is, which the errors of torch's writers do not say; else ``error``."""
        if isinstance(error, Exception) and not isinstance(error, (RankFailed, RankUnreachable)):
            try:
                self._directory.require_space(self.folder)
            except NotEnoughSpace as lacking:
                return lacking
        return error


def _give_each_node_all(folder: Path, nodes: Nodes, ranks: Ranks) -> None:
    """Give every node the files that ranks of other nodes have written; on every rank, when all have written theirs.

    Afterwards every node has every file of the checkpoint, so that any one of them can give it to all others. What each
    node has written itself stays as it is.

    Raises:
        OSError: A file could not be read or written, or did not arrive as it was sent.
        RankFailed: That happened on another rank.
    """
    with ranks.agree(what="giving each node the files of all ranks"):
        transfer = FileTransfer(ranks, nodes)
        found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_below(folder)}
        told = ranks.gather(found if nodes.leads else {}, what="comparing the files of a save")
        sizes = {path: size for files in reversed(told) for path, size in files.items()}
        givers = {path: next(rank for rank in nodes.leaders if path in told[rank]) for path in sorted(sizes)}
        moved = [path for path in givers if any(path not in told[rank] for rank in nodes.leaders)]
        if nodes.leads:
            files = [(givers[path], path, sizes[path]) for path in moved]
            transfer.send(files, folder, lambda path: path not in found)
        digests = {path: digest_file(folder / path) for path in moved} if nodes.leads else {}
        digests_of = ranks.gather(digests, what="comparing the files that were sent")
        wrong = [path for path in moved if len({digests_of[rank][path] for rank in nodes.leaders}) > 1]
        if wrong:
            raise OSError(f"{folder / wrong[0]}: did not arrive as it was sent")
