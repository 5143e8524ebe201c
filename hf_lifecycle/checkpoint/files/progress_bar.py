"""A bar for what takes longer than a second to read: in a terminal and in a notebook.

Elsewhere, as in the log of a cluster, one line at level INFO says what is waited for. Neither comes from a rank other
than the first, nor where the package's warnings are switched off.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["reading"]

logger = logging.getLogger("hf_lifecycle")

PATIENCE = 1.0  # seconds without a bar


@contextmanager
def reading(what: str, total: int, *, shown: bool = True) -> Iterator[Callable[[int], None]]:
    """Bytes that are read, shown from :data:`PATIENCE` seconds on; yields what is told of every block.

    Args:
        what: What is done, for the person who waits: ``verifying checkpoint-40``.
        shown: Whether there may be a bar or a line at all.
    """
    began, read = time.monotonic(), 0
    bar: Any = None
    waits = shown and os.environ.get("RANK", "0") == "0" and logger.isEnabledFor(logging.WARNING)

    def advance(size: int) -> None:
        nonlocal read, bar, waits
        read += size
        if bar is not None:
            bar.update(size)
        elif waits and time.monotonic() - began >= PATIENCE:
            waits = False
            bar = _bar_for(what, total, read)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


def _bar_for(what: str, total: int, read: int) -> Any:
    from tqdm.auto import tqdm  # nothing that is read quickly waits for this import

    # Without a thread of tqdm's that would look whether the bar stands still. disable=None: in a terminal alone;
    # tqdm's bar for notebooks takes it for False.
    kind = type("Bar", (tqdm,), {"monitor_interval": 0})
    bar = kind(desc=what, total=total, initial=read, unit="B", unit_scale=True, leave=False, disable=None)
    if not bar.disable:
        return bar
    logger.info("%s: %.1f GB to read", what, total / 1e9)
    return None
