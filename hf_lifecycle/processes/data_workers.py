"""Data workers live on when a signal to the training reaches them too, and end when the training ends them.

A scheduler, a terminal or a launcher sends its signal to a whole process group. PyTorch lets a worker die of a SIGTERM
that does not come from the training, and raises in the training then, before that could save.

Promise: workers that are started while signals are spared do nothing at one of those, from their first instruction to
their last. What they start themselves, by exec or by fork, ends by it as ever. The training ends a worker that does not
end by itself at once, whatever that worker is doing; multiprocessing does so when the interpreter ends.

Not promised: workers that were started before; those of another library than torch and torchdata. A handler that a
worker's own code sets is the one in force there.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

__all__ = ["SparedWorkers"]

_LOOPS = ("torch.utils.data._utils.worker", "torchdata.stateful_dataloader.worker")
_TORCH = "torch.utils.data._utils.signal_handling"
_TO_DIE = 5.0  # seconds that a killed process gets; one that waits for a broken disk can take for ever

Start = Callable[[BaseProcess], None]


class SparedWorkers:
    """Spares the data workers that this process starts some signals, until a training ``is_over``."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        self._is_over = is_over
        self._before: Start | None = None
        self._ours: Start | None = None
        self._started: weakref.WeakSet[BaseProcess] = weakref.WeakSet()

    def begin(self, signals: Sequence[int]) -> None:
        """Spare those that are started from here on. Nothing is done where a system knows no signal masks."""
        if not signals or not hasattr(signal, "pthread_sigmask"):
            return
        # Invariant: the one place through which every loader's workers come, whoever made the loader.
        self._before = before = BaseProcess.start

        def start(process: BaseProcess) -> None:
            if not _is_data_worker(process):
                before(process)
            elif self._is_over():
                self.put_back()
                before(process)
            else:
                _start_spared(process, signals, before)
                self._started.add(process)

        self._ours = BaseProcess.start = start  # type: ignore[method-assign, assignment]

    def put_back(self) -> None:
        """Spare no more of them, where nobody has replaced what starts them since. Those that are spared stay so."""
        if self._before is not None and BaseProcess.start is self._ours:
            BaseProcess.start = self._before  # type: ignore[method-assign, assignment]

    def end(self) -> None:
        """End those that are left: this process is about to end without a chance to do it."""
        for process in multiprocessing.active_children():
            if process in self._started:
                process.terminate()


def _is_data_worker(process: Any) -> bool:
    """Whether a process that was not started yet is to be a loader's worker, of a torch that lets it be spared."""
    target = getattr(process, "_target", None)
    loop = getattr(target, "__module__", None), getattr(target, "__name__", None)
    is_worker = loop[1] == "_worker_loop" and loop[0] in _LOOPS
    return is_worker and hasattr(sys.modules.get(_TORCH), "_set_worker_signal_handlers")


def _start_spared(process: Any, signals: Sequence[int], start: Start) -> None:
    # A signal that comes before the worker can hear it waits: the mask is inherited, the worker takes it off. What the
    # start may start besides, to serve others too, must not inherit it.
    if (getattr(process, "_start_method", None) or multiprocessing.get_start_method()) == "forkserver":
        from hf_lifecycle.processes.fork_server import ensure_spared

        ensure_spared()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        blocked = tuple(set(signals) - before)
        process._target, process._args = _work, (process._target, tuple(signals), blocked, *process._args)
        start(process)
        # Process.terminate comes here, and so does multiprocessing's end, which joins without a limit after it.
        process._popen.terminate = partial(_end, process._popen)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(popen: Any) -> None:
    """End a worker by a signal that it cannot be spared."""
    with _unreported():
        popen.kill()
        limit = time.monotonic() + _TO_DIE
        while popen.poll() is None and time.monotonic() < limit:
            time.sleep(0.002)


@contextmanager
def _unreported() -> Iterator[None]:
    """Within the block torch does not hear of a worker's death, which it would raise: this one is meant."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGCHLD)):
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _work(loop: Callable[..., None], signals: Sequence[int], blocked: Sequence[int], *args: Any) -> None:
    """In the worker: run torch's loop, spared ``signals``."""
    handling: Any = __import__(_TORCH, fromlist=[""])
    torchs_own = handling._set_worker_signal_handlers
    handler = partial(_leave_to_training, os.getpid())

    def set_handlers() -> None:
        torchs_own()  # in C, of which Python's signal module does not know
        for number in signals:
            signal.signal(number, handler)
            signal.siginterrupt(number, False)  # what a library waits for in C continues
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)

    handling._set_worker_signal_handlers = set_handlers
    loop(*args)


def _leave_to_training(worker: int, number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    if os.getpid() == worker:
        return
    # A process that the worker has forked: the signal does there what it does in any other.
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.raise_signal(number)
