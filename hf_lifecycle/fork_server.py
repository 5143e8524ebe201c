"""Imported by the fork server that makes data workers: a signal that its whole group gets does not end it.

Promise: the server does nothing at SIGTERM, SIGUSR1 and SIGUSR2, while every process that it makes ends by them as any
other does. It goes when the last process that uses it does, as ever. Imported anywhere else, this does nothing.

Not promised: a server that was started by someone else before; a worker in the moment before it runs torch's loop.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import partial
from multiprocessing import forkserver
from types import FrameType
from typing import Any

__all__ = ["ensure_spared"]

_SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")  # SIGINT it ignores by itself


def ensure_spared() -> None:
    """Have a fork server, which is spared where it does not run yet."""
    server: Any = vars(forkserver)["_forkserver"]
    if __name__ not in server._preload_modules:
        server.set_forkserver_preload([*server._preload_modules, __name__])
    forkserver.ensure_running()


def _hear(server: int, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if os.getpid() != server:
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


def _is_server() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not forkserver.main.__code__:
        frame = frame.f_back
    return frame is not None


if _is_server():
    for _name in _SIGNALS:
        if signal.getsignal(getattr(signal, _name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, _name), partial(_hear, os.getpid()))
