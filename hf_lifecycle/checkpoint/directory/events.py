"""The run's event log, ``lifecycle.jsonl`` in the output directory: what happened to its checkpoints, and why.

One JSON object a line, in the order of the events, over all runs into the directory::

    {"time": "2026-01-31T12:00:00.000000+00:00", "event": "committed", "step": 40, "seconds": 0.2, "bytes": 1024, ...}

Promise: each line is appended with a single write; the file stays under about :data:`LARGEST` bytes, since its older
half is dropped when it grows beyond; a log that cannot be written is one warning and never stops a training. Reading
runs nothing and is bounded; lines that are torn or foreign are skipped.

Not promised: that the last lines outlive a power cut. Nothing is flushed, and no decision ever rests on the log.
"""

from __future__ import annotations

import json
import logging
import math
import os
import stat
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import MappingProxyType

from hf_lifecycle.checkpoint.files.durable import write_atomically
from hf_lifecycle.checkpoint.files.regular import open_regular

__all__ = ["LOG_NAME", "Event", "EventLog", "read_events"]

logger = logging.getLogger(__name__)

LOG_NAME = "lifecycle.jsonl"
LARGEST = 4 << 20
EVENTS = frozenset(
    {"started", "saved", "committed", "resumed", "skipped", "removed", "recovered", "stopped", "preempted", "failed"}
    | {"ended", "mirrored", "mirror_removed", "mirror_failed", "asked", "snapshot", "written", "accepted"}
)

_LONGEST_LINE = 16 << 10
_LONGEST_TEXT = 2000  # characters of one value
_MOST_READ = 2 * LARGEST

Value = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Event:
    """One line of the log.

    Attributes:
        time: When, with a time zone.
        event: What: one of :data:`EVENTS`, or what a newer version wrote.
        facts: The rest: ``step``, ``seconds``, ``bytes``, ``path``, ``why``, ..., in the order they were written.
    """

    time: datetime
    event: str
    facts: Mapping[str, Value] = field(default_factory=lambda: MappingProxyType({}))


class EventLog:
    """Appends to the log of an output directory, which exists when the first event comes.

    A failure to write is said once, and then no more. At ``largest`` bytes, the older half is dropped.
    """

    def __init__(self, directory: Path, *, largest: int = LARGEST) -> None:
        self._file = directory / LOG_NAME
        self._largest = largest
        self._has_failed = False
        self._lock = threading.Lock()  # what runs in the background tells of itself

    def write(self, event: str, **facts: Value) -> None:
        """Append one event; facts that are None are left out. Never raises for what the disk does.

        Raises:
            ValueError: ``event`` is none of :data:`EVENTS`.
        """
        if event not in EVENTS:
            raise ValueError(f"event must be one of {sorted(EVENTS)}, got {event!r}")
        line = _line(event, facts)
        with self._lock:
            try:
                if self._append(line) > self._largest:
                    self._drop_older_half()
            except OSError as error:
                if not self._has_failed:
                    logger.warning("%s: events cannot be written (%s)", self._file, error.strerror or error)
                self._has_failed = True

    def _append(self, line: bytes) -> int:
        """Append in one write. Returns the size of the file then."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
        descriptor = os.open(self._file, flags | getattr(os, "O_BINARY", 0), 0o666)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(None, "not a regular file")
            # A line that a kill or a full disk tore stays alone on its line.
            os.lseek(descriptor, max(0, status.st_size - 1), os.SEEK_SET)  # O_APPEND writes at the end all the same
            data = line if os.read(descriptor, 1) in (b"", b"\n") else b"\n" + line
            if os.write(descriptor, data) != len(data):
                raise OSError(None, "no space left")
            return status.st_size + len(data)
        finally:
            os.close(descriptor)

    def _drop_older_half(self) -> None:
        with open(self._file, "rb") as file:
            file.seek(-min(self._largest // 2, os.fstat(file.fileno()).st_size), os.SEEK_END)
            newer = file.read(self._largest // 2).partition(b"\n")[2]
        write_atomically(self._file, lambda file: file.write(newer))


def read_events(directory: str | os.PathLike[str]) -> list[Event]:
    """The events of an output directory, oldest first; none where there is no log.

    Of a log that is larger than this package lets one grow, the end is read. Passed over: lines that are torn, longer
    than 16 KiB, no JSON object, or without ``time`` and ``event``; of a line, values that are neither text nor number.

    Raises:
        OSError: The log is there and cannot be read.
    """
    path = Path(directory) / LOG_NAME
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return []
    with file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _MOST_READ))
        lines = file.read(_MOST_READ).split(b"\n")
    return [event for line in lines if (event := _parse(line)) is not None]


def _line(event: str, facts: Mapping[str, Value]) -> bytes:
    known = {name: _bounded(value) for name, value in facts.items() if value is not None}
    time = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    return json.dumps({"time": time, "event": event, **known}, allow_nan=False).encode() + b"\n"


def _bounded(value: Value) -> Value:
    if isinstance(value, str) and len(value) > _LONGEST_TEXT:
        return value[: _LONGEST_TEXT - 1] + "…"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no NaN
    return value


def _parse(line: bytes) -> Event | None:
    if not line or len(line) > _LONGEST_LINE:
        return None
    try:
        body = json.loads(line)
        time, event = datetime.fromisoformat(body.pop("time")), body.pop("event")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    if not isinstance(event, str) or time.tzinfo is None:
        return None
    facts = {name: value for name, value in body.items() if isinstance(value, (str, int, float, bool))}
    return Event(time, event, MappingProxyType(facts))
