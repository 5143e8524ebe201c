"""Saves that training does not stop for, whichever host trains: what they are learned from, and the one in flight.

The first save is the host's own, and the template of all others; a thread compares it with what it was made of, and
commits it. From then on the host captures: tensors go into a snapshot, and a thread writes them. Where a template
cannot be had, the host continues saving, and one line says why.

Promise: at most one save is in flight, since the next one waits for it. On the rank that writes alone; nothing here is
an exchange with other ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from hf_lifecycle.checkpoint.directory.store import discard
from hf_lifecycle.engine.deferred_proof import Deferred
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.saving.captured import (
    Captured,
    GiveUp,
    Provable,
    Save,
    SnapshotTorn,
    WrittenSave,
    prove_and_commit,
    write_and_commit,
)
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.snapshots.async_capture import AsyncCapture
from hf_lifecycle.saving.snapshots.gc_pause import gc_paused
from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.writer import Writer

__all__ = ["COSTS_THE_BACKGROUND", "BackgroundSaves", "Commit", "Learned"]

logger = logging.getLogger("hf_lifecycle")

_MOST_TRIES = 3  # saves of the host's own to learn from, where tensors could not be told apart
# What odd tensors and hosts raise when a save is prepared that the host can make as well.
COSTS_THE_BACKGROUND = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, RuntimeError, ValueError)

Commit = Callable[[Save], int]  # on the writer's thread; gives the bytes of the checkpoint


class Template(Protocol):
    """What a host's files are written like."""

    @property
    def ingredients(self) -> Any: ...


T = TypeVar("T", bound=Template)
C = TypeVar("C", bound=Captured)


class Learned(NamedTuple, Generic[T]):
    """What a save of the host's own has shown.

    Attributes:
        comparisons: What is still to be proved of them.
        tensors: All that a snapshot consists of.
        plans: The files that the copies are laid out like.
    """

    template: T
    comparisons: Sequence[Provable]
    tensors: Sequence[LiveTensor]
    plans: Sequence[Plan]


class BackgroundSaves(Generic[T]):
    """The background saves of one run.

    Args:
        host: Who saves otherwise, for the log.
        otherwise: What that means, for the log.

    Attributes:
        is_left_to_host: Whether all saves are the host's own.
        template: What files are written like; None where the next save is the host's own.
        at_once: Whether a template cannot be proved by names and digests, so that bytes are compared at once.
        written: The last save, if that was the host's own and is a template.
        in_flight: Whether a save was handed over, and is not settled.
        given_up: That its snapshot was torn.
    """

    def __init__(self, directory: RunDirectory, *, host: str, otherwise: str) -> None:
        self._directory = directory
        self._host = host
        self._otherwise = otherwise
        self.overlap = AsyncCapture()
        self.template: T | None = None
        self.at_once = False
        self.written: WrittenSave | None = None
        self.in_flight = False
        self.given_up: SaveFailed | None = None
        self.is_left_to_host = False
        self._is_whole = True  # the last save, once it is settled
        self._tries = 0
        self._waited = 0.0  # seconds for which saves have waited for the one before
        self._writer = Writer()

    def leave_to_host(self, reason: str) -> None:
        """Let the host save from now on."""
        self.is_left_to_host, self.template = True, None
        logger.warning("%s: %s", self._otherwise, reason)

    # A save

    def begin(self) -> None:
        """A save is due, and the one before is settled: what it was to prove is known."""
        self.given_up, self._is_whole = None, True
        written, self.written = self.written, None
        if written is not None and not written.is_proved:
            self.template, self.at_once = None, written.obstacle is not None
            logger.info(
                "this save is made by %s, in the training loop: %s",
                self._host,
                written.obstacle or "the last background save failed",
            )
            self.overlap.release()

    def fits(self, ingredients: Any) -> bool:
        """Whether there is a template, and it is of what is trained now."""
        if self.template is None:
            return False
        if self.template.ingredients != ingredients:
            said = (
                "the model, the optimizer or the configuration changed, so this save is made by %s, in the "
                "training loop"
            )
            logger.info(said, self._host)
            self.template, self._tries = None, 0
        return self.template is not None

    def watching(self) -> AbstractContextManager[None]:
        """Around a save of the host's own that is going to be learned from."""
        return nullcontext()

    def learn(self, step: int, began: float, look: Callable[[], Learned[T]]) -> None:
        """Learn from what the host has just written; :attr:`written` is then what is to be proved.

        Args:
            began: When the save began, by the monotonic clock.
            look: Looks at it. May raise ``NotLearned``, and what odd tensors and states raise.
        """
        self._tries += 1
        try:
            found = look()
            self.template = found.template
            no_room = self.overlap.prepare(found.tensors, found.plans)
        except NotLearned as error:
            self.template = None
            if not error.ambiguous or self._tries >= _MOST_TRIES:
                self.leave_to_host(str(error))
            return
        except TypeError as error:
            no_room = f"the optimizer's state holds a {error}"
        except COSTS_THE_BACKGROUND as error:
            no_room = f"{type(error).__name__}: {error}"
        if no_room is not None:
            self.leave_to_host(no_room)
        else:
            self.written = WrittenSave(step=step, asked=began, comparisons=found.comparisons)

    def capture(
        self, step: int, began: float, tensors: Sequence[LiveTensor], make: Callable[..., C], *, overlap: bool
    ) -> C:
        """Capture a save at this moment.

        Args:
            began: When the save began, by the monotonic clock.
            make: Makes the record of it, and is given what is known of it here, by name.
            overlap: Whether a step follows, which waits for the snapshot.
        """
        waited, self._waited = self._waited, 0.0  # for the save before
        self._directory.tell("asked", step, waited_seconds=waited)
        with gc_paused():
            captured = make(step=step, asked=began, snapshot=self.overlap.take(tensors, overlap=overlap))
        captured.stall = waited
        return captured

    def prove(self, session: SaveSession, digests: Mapping[str, str], commit: Commit) -> None:
        """Let what the host has written be proved and committed, now that every rank has written its part.

        Args:
            digests: Those of the tensors that it was made of.
        """
        save = self.written
        assert save is not None
        save.digests = digests
        self.overlap.warm()

        def work(_: Blocks) -> None:
            give_up = self._removal(session)
            prove_and_commit(save, session.folder, lambda: commit(save), self._directory.tell, give_up)
            self._is_whole = True

        self._start(save, session, work)

    def hand_over(
        self,
        save: Deferred,
        session: SaveSession,
        commit: Commit,
        done: Callable[[int], object] | None = None,
    ) -> None:
        """Let a captured save be written and committed, now that every rank has written its part.

        Args:
            done: Is told the bytes of the checkpoint, on the writer's thread.
        """

        def work(blocks: Blocks) -> None:
            tell = self._directory.tell
            give_up = self._removal(session)

            def write() -> None:
                files = Files(session.folder, blocks)
                save.told = save.write(files, session)
                save.known, save.size = files.known, files.size

            size = write_and_commit(save, session.folder, write, lambda: commit(save), tell, give_up)
            self._is_whole = not isinstance(size, SnapshotTorn)
            if isinstance(size, SnapshotTorn):
                self.given_up = SaveFailed(session.final.name, size)
            elif done is not None:
                done(size)

        self.overlap.guard(save)
        self._start(save, session, work)

    def begin_part(self, session: SaveSession) -> None:
        """What this rank has captured, or has to prove, is going to be handed over."""

    def _removal(self, session: SaveSession) -> GiveUp:
        """What is done with what was written of a save that is given up; on the writer's thread, if there is one."""
        return lambda _: discard(session.folder)

    def _start(self, save: Save, session: SaveSession, work: Callable[[Blocks], object]) -> BaseException | None:
        """Let a thread do the rest. Returns why there is none, which is then what became of the save."""
        save.stall += time.monotonic() - save.asked  # before there is a thread that reads it
        self.in_flight, self._is_whole = True, False
        failure = self._writer.start(work, session.final.name, session.final.parent)
        if failure is not None:
            self._removal(session)(failure)
        return failure

    # What is in flight

    def begin_writing(self) -> None:
        """Let the thread of the last save begin, now that training waits for nothing more of that save."""
        self._writer.begin()

    def torn_so_far(self) -> bool:
        """Whether the last snapshot is torn, as far as that can be told without holding training up."""
        return self.given_up is not None or self.overlap.torn_so_far()

    def settle(self) -> bool | None:
        """Wait for the save in flight. Returns whether it is committed, or was torn; None if there was none.

        Raises:
            SaveFailed: It went wrong.
        """
        was_one, self.in_flight = self.in_flight, False
        try:
            self._waited += self._writer.wait()
        finally:
            self.overlap.settle()
        return self._is_whole if was_one else None

    def is_whole(self) -> bool:
        """Wait for the save in flight. Returns whether the last one is committed; if not, it was told why."""
        try:
            self.settle()
        except SaveFailed:
            return False
        return self._is_whole

    def require_whole(self) -> None:
        """Wait for the save in flight, which no other makes up for.

        Raises:
            SaveFailed: It went wrong, or its snapshot was torn.
        """
        self.settle()
        if self.given_up is not None:
            raise self.given_up

    def join(self) -> None:
        """Wait for the save in flight, and leave what went wrong to :meth:`settle`."""
        self._writer.join()

    def finish(self) -> None:
        """As :meth:`join`, and no step waits for the snapshot any more."""
        self.join()
        self.overlap.settle()

    def close(self) -> None:
        """Wait for the save in flight, and give everything back.

        Raises:
            SaveFailed: It went wrong.
        """
        try:
            self.settle()
        finally:
            self.overlap.close()
