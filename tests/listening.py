"""What the package logs, kept by a process that pytest does not listen to."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["listening"]


class _Listener(logging.Handler):
    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def listening(level: int = logging.NOTSET) -> Iterator[list[str]]:
    """The lines that are logged within the block, as they come; from this level on."""
    listener, logger = _Listener(level), logging.getLogger("hf_lifecycle")
    logger.addHandler(listener)
    try:
        yield listener.lines
    finally:
        logger.removeHandler(listener)
