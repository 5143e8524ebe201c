"""A bar for what takes longer than a second to read: in a terminal and in a notebook.

Elsewhere, as in the log of a cluster, one line at level INFO says what is waited for. Neither comes from a rank other
than the first, nor where the package's warnings are switched off.
"""

from __future__ import annotations

import logging
import os
import time
from types import TracebackType
from typing import Any

__all__ = ["PATIENCE", "Reading"]

logger = logging.getLogger("hf_lifecycle")

PATIENCE = 1.0  # seconds without a bar


class Reading:
    """Bytes that are read, shown from :data:`PATIENCE` seconds on; a context manager.

    Args:
        what: What is done, for the person who waits: ``verifying checkpoint-40``.
        total: Bytes to read.
        shown: Whether there may be a bar or a line at all.
    """

    def __init__(self, what: str, total: int, *, shown: bool = True) -> None:
        self._what = what
        self._total = total
        self._read = 0
        self._began = time.monotonic()
        self._bar: Any = None
        is_first_rank = os.environ.get("RANK", "0") == "0"
        self._waits = shown and is_first_rank and logger.isEnabledFor(logging.WARNING)

    def __enter__(self) -> Reading:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, size: int) -> None:
        """``size`` more bytes were read."""
        self._read += size
        if self._bar is not None:
            self._bar.update(size)
        elif self._waits and time.monotonic() - self._began >= PATIENCE:
            self._waits = False
            self._show()

    def _show(self) -> None:
        from tqdm.auto import tqdm  # nothing that is read quickly waits for this import

        # Without a thread of tqdm's that would look whether the bar stands still. disable=None: in a terminal alone;
        # tqdm's bar for notebooks takes it for False.
        kind = type("Bar", (tqdm,), {"monitor_interval": 0})
        bar = kind(
            desc=self._what, total=self._total, initial=self._read, unit="B", unit_scale=True, leave=False, disable=None
        )
        if bar.disable:
            logger.info("%s: %.1f GB to read", self._what, self._total / 1e9)
        else:
            self._bar = bar
