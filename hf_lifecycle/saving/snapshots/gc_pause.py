"""When Python looks for garbage: not while training waits for a snapshot to be asked for."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["gc_paused"]


@contextmanager
def gc_paused() -> Iterator[None]:
    """Within the block, which takes milliseconds, no garbage is collected; Python does that soon after it.

    A snapshot makes thousands of small objects, all of which live on. They would have Python go through what is young
    ten times, and now and then through all that a program has.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
