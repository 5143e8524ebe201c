"""Background saves of which every rank writes a part, where a host's files are written by all ranks.

Promise: all ranks capture a save, or none does; it is decided by one exchange before anything is captured, and by one
more, after a save of the host's own, whether it is a template on all of them. What one rank cannot do, none does, and
one line says which and why. The threads make no exchange: rank 0's waits for the files by which the others tell that
theirs is written (see :mod:`~hf_lifecycle.engine.rank_parts`), and commits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from hf_lifecycle.checkpoint.directory.store import discard
from hf_lifecycle.engine.background_saves import COSTS_THE_BACKGROUND, BackgroundSaves, Commit, Learned, Template
from hf_lifecycle.engine.deferred_proof import Deferred
from hf_lifecycle.engine.rank_parts import Part
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import RankFailed, RankUnreachable
from hf_lifecycle.saving.captured import GiveUp, Save
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.snapshots.placement import LiveTensor

__all__ = ["SharedSaves"]

logger = logging.getLogger("hf_lifecycle")

T = TypeVar("T", bound=Template)
P = TypeVar("P", bound="Present")


class Present(Protocol):
    """What there is to be captured."""

    @property
    def ingredients(self) -> Any: ...

    @property
    def tensors(self) -> Sequence[LiveTensor]: ...


_NOT_YET = ""  # no reason against a capture but that there is no template


class SharedSaves(BackgroundSaves[T]):
    """As :class:`~hf_lifecycle.engine.background_saves.BackgroundSaves`, made by all ranks together.

    Attributes:
        is_left_by_all: Whether all saves are the host's own, on every rank, which all of them know.
    """

    def __init__(self, directory: RunDirectory, *, host: str, otherwise: str) -> None:
        super().__init__(directory, host=host, otherwise=otherwise)
        self._ranks = directory.ranks
        self._why = ""
        self.is_left_by_all = False

    def begin(self) -> None:
        written = self.written
        super().begin()
        if written is not None and written.obstacle is not None:
            self.leave_to_host(str(written.obstacle))

    def leave_to_host(self, reason: str) -> None:
        """Let the host save from now on. The others, and the log, are told at the next exchange."""
        self.is_left_to_host, self.template, self._why = True, None, reason

    def present(self, obstacle: str | None, look: Callable[[T], P]) -> P | None:
        """What there is to be captured on this rank; None on all ranks where one cannot capture it.

        Args:
            obstacle: Why this rank cannot.
            look: Looks at what there is. May raise ``NotLearned`` where it is not what the template is of, and what odd
                tensors and states raise.
        """
        found, reason = self.looked(obstacle, look)
        return found if self.agree(reason) else None

    def looked(self, obstacle: str | None, look: Callable[[T], P]) -> tuple[P | None, str | None]:
        """What there is to be captured on this rank; or why nothing is, empty if that may be later."""
        if self.template is None or obstacle is not None:
            return None, _NOT_YET if obstacle is None else obstacle
        try:
            found = look(self.template)
            if not self.fits(found.ingredients):
                return None, _NOT_YET
            return found, self.overlap.make_room(found.tensors, tuple)
        except (NotLearned, KeyError):
            self.fits(None)
            return None, _NOT_YET
        except (TypeError, *COSTS_THE_BACKGROUND) as error:
            return None, f"{type(error).__name__}: {error}"

    def agree(self, obstacle: str | None) -> bool:
        """Whether no rank has an obstacle. What one rank has, leaves the saves of all to the host.

        Args:
            obstacle: Why this rank cannot; empty if it may later; None if it can.
        """
        told = self._ranks.gather(self.told(obstacle), what="deciding whether this save is made in the background")
        return self.decide(told)

    def told(self, obstacle: str | None) -> str | None:
        """What this rank tells the others: as :meth:`agree` is given it, or why the host makes all saves here."""
        return self._why if self.is_left_to_host else obstacle

    def decide(self, told: Sequence[str | None]) -> bool:
        """As :meth:`agree`, by what every rank has told."""
        reasons = {rank: reason for rank, reason in enumerate(told) if reason}
        if reasons:
            rank, reason = next(iter(reasons.items()))
            self.is_left_to_host, self.template, self.is_left_by_all = True, None, True
            self.overlap.release()
            if self._ranks.is_main:
                where = "" if len(set(told)) == 1 else f"rank {rank}: "
                logger.warning("%s: %s%s", self._otherwise, where, reason)
        return all(reason is None for reason in told)

    def begin_part(self, session: SaveSession) -> None:
        session.parts.begin()

    def learn(self, step: int, began: float, look: Callable[[], Learned[T]]) -> None:
        """As there, on every rank: what the host has just written is a template on all ranks, or on none."""
        if not self.is_left_to_host:
            super().learn(step, began, look)
        if not self.agree(_NOT_YET if self.written is None else None):
            self.written = self.template = None

    def prove(self, session: SaveSession, digests: Mapping[str, str], commit: Commit) -> None:
        """As there, on every rank, each of which has begun its part."""

        def commit_all(save: Save) -> int:
            try:
                self._take_over(save, session.parts.wait())
            except (RankFailed, RankUnreachable) as error:  # what they were to compare is on the disk all the same
                logger.warning("%s: %s", session.final.name, error)
            return self._committed(save, session, commit)

        super().prove(session, digests, commit_all if self._ranks.is_main else lambda save: _tell(session, save, {}))

    def hand_over(
        self,
        save: Deferred,
        session: SaveSession,
        commit: Commit,
        done: Callable[[int], object] | None = None,
    ) -> None:
        """As there, on every rank, each of which has begun its part (:meth:`begin_part`); rank 0 commits."""

        def commit_all(_: Save) -> int:
            parts = session.parts.wait()
            self._take_over(save, parts)
            save.complete(session.folder, [save.told, *(part.facts for part in parts.values())])
            return self._committed(save, session, commit)

        if self._ranks.is_main:
            super().hand_over(save, session, commit_all, done)
        else:
            super().hand_over(save, session, lambda _: _tell(session, save, save.told))

    @staticmethod
    def _committed(save: Save, session: SaveSession, commit: Commit) -> int:
        size = commit(save)
        session.parts.remove()
        return size

    @staticmethod
    def _take_over(save: Save, parts: Mapping[int, Part]) -> None:
        save.known |= {entry.path: entry for part in parts.values() for entry in part.files}

    def _removal(self, session: SaveSession) -> GiveUp:
        if not self._ranks.is_main:
            return session.parts.failed

        def give_up(_: BaseException) -> None:
            if session.parts.wait_for_end():  # else one may be writing there: the next run clears it
                discard(session.folder)
                session.parts.remove()

        return give_up

    def _start(self, save: Save, session: SaveSession, work: Callable[[Blocks], object]) -> BaseException | None:
        def work_and_close(blocks: Blocks) -> None:
            try:
                work(blocks)
            finally:
                session.parts.close()

        session.parts.is_handed_over = True
        try:
            failure = super()._start(save, session, work_and_close)
        except BaseException as error:
            session.parts.failed(error)
            session.parts.close()
            raise
        if failure is not None:
            session.parts.close()
        return failure


def _tell(session: SaveSession, save: Save, told: Mapping[str, Any]) -> int:
    session.parts.done(save.known.values(), told)
    return sum(entry.size for entry in save.known.values())
