"""Copies committed checkpoints to the mirror in the background, and never stands in a training's way.

Promise: :meth:`MirrorWorker.offer` returns at once, and no failure of the mirror raises from it. One copy is under way
and at most one waits, the newest; what it displaces is told. What fails is tried again with growing pauses, and is
told: one warning for each kind of failure, and an event each time. A copy is made from hard links to the checkpoint's
files, so that retention may remove the checkpoint meanwhile. No copy is removed before what is protected, such as the
best checkpoint, is there. :meth:`MirrorWorker.close` waits for the last copy for a while, and then says what is
missing.

Not promised: that every checkpoint is copied; a slow mirror gets the newest. Where the disk has no hard links, a
checkpoint that is removed while it is copied is skipped. The thread is a daemon: a client that hangs can neither be
interrupted nor keep the process from ending, and what it leaves is no copy.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Collection
from importlib import import_module
from pathlib import Path

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy
from hf_lifecycle.errors import LifecycleError, MirrorError, MirrorOfAnotherRun
from hf_lifecycle.mirror.job import MirrorJob, pack, superfluous
from hf_lifecycle.mirror.places import Contents, Copy, Interrupted, Place, read_owner, write_owner
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["MirrorWorker"]

logger = logging.getLogger(__name__)

Tell = Callable[..., None]  # (event, step, **facts), as the event log takes it

_PAUSES = (1.0, 4.0, 16.0, 60.0)  # seconds before each new try


class MirrorWorker:
    """One background thread for one output directory and one mirror.

    Args:
        directory: Its lock is held: what an earlier run left of its copying is removed.
        tell: Is told of events, from the thread too.
        keep: What is kept at the mirror, where that does not say so itself; None for everything.
        pauses: Seconds before the second try, the third, and so on.
    """

    def __init__(
        self,
        mirror: Mirror,
        directory: Path,
        tell: Tell,
        *,
        keep: RetentionPolicy | None = None,
        pauses: Collection[float] = _PAUSES,
    ) -> None:
        self._mirror = mirror
        self._directory = directory
        self._tell = tell
        self._keep = mirror.keep if mirror.keep is not None else keep
        self._pauses = tuple(pauses)
        self._links = store.hidden_folder(directory) / "mirroring"
        self._said: set[str] = set()  # kinds of failure that were warned of
        self._place: Place | None = None
        self._owns = False  # whether the mirror has said that it belongs to this run
        # What both threads touch, under _turn:
        self._turn = threading.Condition()
        self._waiting: MirrorJob | None = None
        self._under_way: MirrorJob | None = None
        self._missing: Path | None = None  # the newest checkpoint that was given up
        self._deadline: float | None = None  # of the end; None while training continues
        self._thread: threading.Thread | None = None
        self._process = os.getpid()
        store.discard(self._links)

    def offer(self, checkpoint: Path, protected: Collection[Path] = ()) -> None:
        """Let a committed checkpoint be copied. Nothing is asked of the mirror here.

        Args:
            checkpoint: The checkpoint; the caller may remove it as soon as this returns.
            protected: Checkpoints that are kept there whatever ``keep`` says, and copied too where they are missing.
        """
        try:
            job = self._pack(checkpoint, protected)
        except (LifecycleError, OSError) as error:
            self._say(f"offer {type(error).__name__}", f"{checkpoint} is not copied to {self._mirror.shown}: {error}")
            return
        with self._turn:
            is_closed = self._deadline is not None
            displaced, self._waiting = (job, None) if is_closed else (self._waiting, job)
            if self._thread is None and not is_closed:
                self._thread = threading.Thread(target=self._work, name="hf_lifecycle mirror", daemon=True)
                self._thread.start()
                _close_at_exit(self)
            self._turn.notify_all()
        if displaced is not None:
            displaced.drop()
            late = "it was committed after copying had ended"
            slow = "a newer checkpoint was committed before its copy began; the mirror is slower than the saves"
            self._skip(displaced, late if is_closed else slow)

    def _pack(self, checkpoint: Path, protected: Collection[Path] = ()) -> MirrorJob:
        return pack(checkpoint, store.working_folder(self._directory, self._links.name), tuple(protected))

    def close(self, seconds: float | None = None) -> None:
        """Wait for what is under way and what waits, by default as long as the settings say; tell what is missing."""
        thread = self._thread
        if thread is None or os.getpid() != self._process:  # a process forked from this one has no such thread
            return
        seconds = self._mirror.wait_seconds if seconds is None else seconds
        with self._turn:
            self._thread = None
            self._deadline = time.monotonic() + seconds
            last = self._waiting or self._under_way
            self._turn.notify_all()
        _open.discard(self)
        if last is not None:
            logger.info("waiting for %s to be copied to %s", last.checkpoint.name, self._mirror.shown)
        try:
            with Ranks.current().working(f"copying to {self._mirror.shown}"):  # the others may be waiting meanwhile
                thread.join(seconds)
        finally:
            self._end(thread, seconds)

    def _end(self, thread: threading.Thread, seconds: float) -> None:
        with self._turn:
            self._deadline = time.monotonic()  # also where the wait was interrupted: the thread ends at its next check
            left = self._waiting or self._under_way
            missing = left.checkpoint if left is not None else self._missing
            waiting, self._waiting = self._waiting, None
        if waiting is not None:
            waiting.drop()
        if missing is not None:
            why = f"not finished after {seconds:g} s" if thread.is_alive() else "see the warnings above"
            logger.warning("%s is NOT at %s (%s); it is in %s", missing.name, self._mirror.shown, why, self._directory)
            if left is not None:  # else it was told when it was given up
                name, step = missing.name, left.manifest.step
                self._tell("skipped", step, path=name, mirror=self._mirror.shown, why=why)

    def _work(self) -> None:
        """The thread."""
        while (job := self._next()) is not None:
            delivered = False
            try:
                delivered = self._deliver(job)
            except Interrupted:
                return  # the end has been told
            finally:
                job.drop()
                with self._turn:
                    self._under_way = None
                    self._missing = None if delivered else job.checkpoint

    def _next(self) -> MirrorJob | None:
        with self._turn:
            while self._waiting is None and self._deadline is None:
                self._turn.wait()
            self._under_way, self._waiting = self._waiting, None
            return self._under_way

    def _deliver(self, job: MirrorJob) -> bool:
        """Copy, with new tries, until it is there, a newer one waits, or no pause is left."""
        for pause in (0.0, *self._pauses):
            if pause and not self._pause(pause):
                break
            try:
                with self._mirror.trouble():
                    self._copy(job)
                return True
            except LifecycleError as error:
                if not job.source.exists():
                    self._skip(job, "it was removed before its copy was done")
                    return False
                self._fail(job, error)
                if isinstance(error, MirrorOfAnotherRun):
                    return False  # another try would not find it changed
        self._skip(job, "copying failed; see the warnings above")
        return False

    def _pause(self, seconds: float) -> bool:
        """Wait before a new try; whether it shall be made."""
        until = time.monotonic() + seconds
        with self._turn:
            while (left := min(until, self._deadline or until) - time.monotonic()) > 0 and self._waiting is None:
                self._turn.wait(left)
            return self._waiting is None and (self._deadline is None or time.monotonic() < self._deadline)

    def _check(self, _bytes: int) -> None:
        """Called as bytes are done.

        Raises:
            Interrupted: The end of training waits no longer.
        """
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise Interrupted

    def _copy(self, job: MirrorJob) -> None:
        began = time.monotonic()
        if self._place is None:
            self._place = self._mirror.open()
        contents = self._place.look()
        owner = self._claim(contents)
        there = next((copy for copy in contents.copies if copy.manifest == job.manifest and not copy.problems), None)
        if there is None:
            there = self._put(job, owner, began)
        self._owns = True
        with self._turn:  # it is there, whatever becomes of others
            self._under_way = self._missing = None
        try:
            with self._mirror.trouble():
                others = [copy for copy in contents.copies if copy.name != there.name]
                others += self._put_protected(job, [there, *others], owner)
                self._rotate(self._place, there, sorted(others, key=lambda copy: -copy.step), job)
        except LifecycleError as error:
            self._fail(job, error, "is copied, but other copies could not be added or removed")

    def _put(self, job: MirrorJob, owner: str, began: float) -> Copy:
        assert self._place is not None
        copy = self._place.put(job.source, job.manifest, owner, self._check)
        size, where = sum(entry.size for entry in job.manifest.files), f"{self._mirror.shown}/{copy.name}"
        logger.debug("%s: copied to %s", job.checkpoint.name, where)
        self._tell("mirrored", copy.step, seconds=time.monotonic() - began, bytes=size, path=where)
        return copy

    def _put_protected(self, newest: MirrorJob, copies: list[Copy], owner: str) -> list[Copy]:
        """Copy what is protected and was skipped, such as the best: what it replaces may go only then."""
        there, found = {copy.step for copy in copies if not copy.problems}, []
        for checkpoint in newest.protected_in(self._directory, there):
            try:
                job = self._pack(checkpoint)
            except (LifecycleError, OSError):
                continue  # retention has removed it meanwhile
            with self._turn:
                self._under_way = job
            try:
                found.append(self._put(job, owner, time.monotonic()))
            finally:
                job.drop()
            with self._turn:
                self._under_way = None
        return found

    def _claim(self, contents: Contents) -> str:
        """The name of this run, which the mirror bears too or is free to bear."""
        known = read_owner(self._directory)
        if contents.owner is not None and contents.owner == known:
            return known
        if contents.owner is not None:
            raise MirrorOfAnotherRun(
                self._mirror.shown,
                "it has the checkpoints of another run; use one mirror for each run, or resume that run with "
                "latest_checkpoint(output_dir, mirror=...)",
            )
        if self._owns:
            raise MirrorError(self._mirror.shown, "it has changed since the run started; is the drive still mounted?")
        if contents.copies:
            raise MirrorOfAnotherRun(self._mirror.shown, "it has checkpoints of an unknown run; use another place")
        if known is None:
            known = secrets.token_hex(16)
            write_owner(self._directory, known)
        return known

    def _rotate(self, place: Place, newest: Copy, others: list[Copy], job: MirrorJob) -> None:
        for copy, why in superfluous(newest, others, self._keep, job.steps):
            place.remove(copy)
            where = f"{self._mirror.shown}/{copy.name}"
            logger.debug("%s removed: %s", where, why)
            self._tell("mirror_removed", copy.step, path=where, why=why)

    def _skip(self, job: MirrorJob, why: str) -> None:
        name = job.checkpoint.name
        self._say(f"skip {why}", f"{name} is not copied to {self._mirror.shown}: {why}")
        self._tell("skipped", job.manifest.step, path=name, mirror=self._mirror.shown, why=why)

    def _fail(self, job: MirrorJob, error: LifecycleError, what: str = "could not be copied") -> None:
        kind = f"{what} {type(error.__cause__ or error).__name__}"
        self._say(kind, f"{job.checkpoint.name} {what}: {error}; training continues")
        name = job.checkpoint.name
        self._tell("mirror_failed", job.manifest.step, path=name, mirror=self._mirror.shown, why=str(error))

    def _say(self, kind: str, sentence: str) -> None:
        """Warn once of each kind."""
        level = logging.DEBUG if kind in self._said else logging.WARNING
        self._said.add(kind)
        logger.log(level, "%s", sentence)


_open: set[MirrorWorker] = set()  # those that have a thread
_is_registered = False


def _close_at_exit(worker: MirrorWorker) -> None:
    """Let the process wait, when it ends, for what is under way."""
    global _is_registered
    _open.add(worker)
    if not _is_registered:
        # Clients look up names and write in thread pools, which concurrent.futures ends before atexit's turn comes.
        # It does so through this door of threading's, and whoever comes later is called first.
        import_module("concurrent.futures.thread")
        getattr(threading, "_register_atexit", atexit.register)(_close_all)
        _is_registered = True


def _close_all() -> None:
    for worker in list(_open):
        wait_for(worker._directory)  # a save that is being written is offered when it is committed
        worker.close()
