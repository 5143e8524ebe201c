"""The event log of a run as attempts: one for each call of ``train()``, with its saves and its end.

Promise: any list of events gives attempts; events of an unknown kind are skipped, and so are facts that do not fit
their name. Not promised: where exactly a killed attempt was, since the log has only its last event.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from hf_lifecycle.checkpoint.directory.events import Event

__all__ = ["Attempt", "Save", "attempts_of"]

_BEGINNINGS = frozenset({"started", "resumed"})
_ENDINGS = frozenset({"ended", "stopped", "preempted", "failed"})
_IN_BACKGROUND = frozenset({"asked", "snapshot", "written"})
_ABSURD = 1 << 62  # steps, seconds and bytes beyond it are no one's
_OF_SAVES = _IN_BACKGROUND | {"saved", "committed"}


@dataclass(slots=True)
class Save:
    """One save of an attempt.

    Attributes:
        step: The optimizer step that was saved.
        committed: Whether it became a checkpoint.
        removed: Whether that checkpoint was removed later.
        stall: Seconds for which training waited; None if the log does not have it.
        size: Bytes; None if the log does not have it.
    """

    step: int
    committed: bool = False
    removed: bool = False
    stall: float | None = None
    size: int | None = None
    _in_background: bool = False
    _told: bool = False

    def _hear(self, event: Event) -> None:
        stall = next((_number(value) for name, value in event.facts.items() if name.startswith("stall")), None)
        if stall is not None:
            self.stall, self._told = stall, True
        self._in_background |= event.event in _IN_BACKGROUND
        if self._in_background and not self._told:
            self.stall = None  # what the disk took is not what training waited for
        elif event.event in ("saved", "committed") and not self._told:
            seconds = _number(event.facts.get("seconds"))
            self.stall = self.stall if seconds is None else (self.stall or 0.0) + seconds
        if event.event == "committed":
            size = _number(event.facts.get("bytes"))
            self.committed, self.size = True, None if size is None else int(size)


@dataclass(slots=True)
class Attempt:
    """One call of ``train()``.

    Attributes:
        began: When it began.
        first_step: The optimizer step it began at; None if the start of the log is lost.
        last_step: The last step that the log has.
        last_time: The time of the last event.
        resumed_from: The name of the checkpoint; None for a fresh start.
        ending: ``"ended"``, ``"stopped"``, ``"preempted"``, ``"failed"``, or None: interrupted, or still running.
        why: The reason logged with the ending.
        saves: Its saves, in the order of their steps.
    """

    began: datetime
    first_step: int | None
    last_step: int
    last_time: datetime
    resumed_from: str | None = None
    ending: str | None = None
    why: str | None = None
    _saves: dict[int, Save] = field(default_factory=dict)

    @property
    def saves(self) -> Sequence[Save]:
        """Its saves, in the order of their steps."""
        return [self._saves[step] for step in sorted(self._saves)]

    @property
    def begins_at(self) -> int:
        """Where to draw its beginning: the first step that is known of."""
        known = [self.last_step, *self._saves]
        return min(known) if self.first_step is None else self.first_step

    def _hear(self, event: Event, step: int) -> None:
        self.last_step, self.last_time = max(self.last_step, step), event.time
        if event.event in _OF_SAVES:
            self._saves.setdefault(step, Save(step))._hear(event)
            if self.ending == "failed":  # a save that failed did not end it
                self.ending = self.why = None
        elif not (self.ending == "stopped" and event.event == "ended"):  # every stop is followed by the end
            self.ending, self.why = event.event, _text(event.facts.get("why"))


def attempts_of(events: Iterable[Event]) -> list[Attempt]:
    """The attempts that ``events``, oldest first, tell of, oldest first."""
    attempts: list[Attempt] = []
    for event in events:
        step = _step(event.facts.get("step"))
        if step is None:
            continue
        if event.event in _BEGINNINGS:
            attempts.append(Attempt(event.time, step, step, event.time, _text(event.facts.get("path"))))
        elif event.event == "removed":
            _remove(attempts, step)
        elif event.event in _OF_SAVES or event.event in _ENDINGS:
            if not attempts:
                attempts.append(Attempt(event.time, None, step, event.time))
            attempts[-1]._hear(event, step)
    return attempts


def _remove(attempts: list[Attempt], step: int) -> None:
    """The newest save of this step that is still there is the one that was removed."""
    for attempt in reversed(attempts):
        save = attempt._saves.get(step)
        if save is not None and save.committed and not save.removed:
            save.removed = True
            return


def _number(value: Any) -> float | None:
    finite = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < _ABSURD
    return float(value) if finite else None


def _step(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value < _ABSURD else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
