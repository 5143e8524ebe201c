"""Which saves of this process are still being written, so that whoever looks at their directory waits for them.

Promise: :func:`wait_for` returns when no save that was announced for that directory is under way. Nothing of another
process is known here; that one holds the directory's lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

__all__ = ["announce", "wait_for"]

_under_way: list[tuple[Path, threading.Event]] = []
_lock = threading.Lock()


def announce(directory: Path) -> Callable[[], None]:
    """Say that a save into ``directory`` is under way, until what this returns is called."""
    save = Path(os.path.realpath(directory)), threading.Event()
    with _lock:
        _under_way.append(save)

    def done() -> None:
        with _lock:
            _under_way.remove(save)
        save[1].set()

    return done


def wait_for(directory: str | os.PathLike[str]) -> None:
    """Wait for the saves into ``directory`` that are under way in other threads of this process."""
    wanted = Path(os.path.realpath(directory))
    with _lock:
        ends = [end for where, end in _under_way if where == wanted]
    for end in ends:
        end.wait()
