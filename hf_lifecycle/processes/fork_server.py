"""Imported by the fork server that makes data workers: a signal that its whole group gets does not end it.

Promise: the server does nothing at a signal that a program may end by and handle, while every process that it makes
ends by them as any other does, from its first instruction. It goes when the last process that uses it does, as ever.
Imported anywhere else, this does nothing.

Not promised: a server that was started by someone else before; a worker in the moment before it runs torch's loop.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from multiprocessing import forkserver
from types import FrameType
from typing import Any

__all__ = ["ensure_spared"]

_NAMES = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGQUIT", "SIGALRM", "SIGVTALRM", "SIGXCPU")  # SIGINT it ignores
_before_fork = threading.local()  # ``mask``: the thread's signal mask, to be restored


def ensure_spared() -> None:
    """Have a fork server, which is spared where it does not run yet."""
    server: Any = vars(forkserver)["_forkserver"]
    if __name__ not in server._preload_modules:
        server.set_forkserver_preload([*server._preload_modules, __name__])
    forkserver.ensure_running()


def _spare(signals: set[signal.Signals]) -> None:
    for number in signals:
        signal.signal(number, _ignore)  # not SIG_IGN, which a program that is started here would inherit

    # Trap: Python forgets the signals that a process got before its first instruction, those that a handler is set for.
    # They wait until the process handles them by itself no more.
    def hold() -> None:
        _before_fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def release() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _before_fork.mask)

    def release_in_child() -> None:
        for number in signals:
            if signal.getsignal(number) is _ignore:
                signal.signal(number, signal.SIG_DFL)
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=release_in_child)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing."""


def _is_server() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not forkserver.main.__code__:
        frame = frame.f_back
    return frame is not None


if _is_server():
    _there = {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}
    _spare({number for number in _there if signal.getsignal(number) is signal.SIG_DFL})
