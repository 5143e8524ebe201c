"""Signals that ask a training to end are remembered until it has saved, and then do what they would have done.

Promise: while a training runs in the main thread, the first signal sets a flag and nothing else; a Ctrl-C after it
ends at once. When the training is over, also by an exception that nobody told of, the handlers of others work as if
this one had never been there. In a data worker, which a fork gives a copy of the handler, Ctrl-C is left to the
process that the worker belongs to; in any other forked process the signal does what it always did.

Not promised: anything outside the main thread, where Python lets no handler be set; that a signal is heard while a
single long call into C runs; handlers that were set by C code, which are left alone together with their signal.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

from hf_lifecycle.processes.data_workers import SparedWorkers

__all__ = [
    "SIGNALS",
    "OnPreempt",
    "SignalWatch",
    "TrainingFrame",
    "frame_of_loop",
    "put_back_left_over",
    "signals_named",
]

SIGNALS = ("SIGTERM", "SIGINT")  # what is heard where nothing else is asked for
OnPreempt = Literal["raise", "return"]

# A launcher that is interrupted with its whole process group interrupts its processes once more: one press, twice.
_ONE_PRESS = 1.0  # seconds
_UNHEARD = ("SIGKILL", "SIGSTOP")
_ANSWER = b"\nCtrl-C: saving when this step is done, then ending; Ctrl-C again ends at once\n"


def signals_named(names: Sequence[str]) -> tuple[signal.Signals, ...]:
    """The signals of these names, such as ``"SIGTERM"``.

    Raises:
        TypeError: No sequence of names.
        ValueError: A name that this system has no signal of, that cannot be handled, or that is there twice.
    """
    if not isinstance(names, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f'signals must be names, such as ("SIGTERM", "SIGINT"), or () for none, got {names!r}')
    known = {number.name: number for number in signal.Signals}
    wrong = [name for name in names if name not in known or name in _UNHEARD]
    if wrong:
        raise ValueError(f"signals: {', '.join(map(repr, wrong))}: not a signal that can be handled on this system")
    if len(set(names)) < len(names):
        raise ValueError(f"signals: a name is given twice: {tuple(names)!r}")
    return tuple(known[name] for name in names)


class SignalWatch:
    """Hears some signals during one training.

    Args:
        answer: Whether a Ctrl-C is answered on standard error at once: a person who sees nothing presses again.

    Attributes:
        received: The first signal that came; None while none has.
    """

    def __init__(self, signals: Sequence[signal.Signals], *, answer: bool = True) -> None:
        self.received: signal.Signals | None = None
        self._signals = tuple(signals)
        self._answer = answer
        self._received_at = 0.0
        self._process = 0
        self._training = TrainingFrame(None)
        self._before: dict[int, Any] = {}  # the handlers of others
        self._over = True
        self._workers = SparedWorkers(self.is_left_over)

    def install(self, training: FrameType | None) -> None:
        """Begin to listen. Nothing is done outside the main thread, nor for a signal that is ignored.

        Args:
            training: The frame that runs the training. When it has been left, the training is over. None: only
                :meth:`put_back` tells that.
        """
        put_back_left_over()
        if threading.current_thread() is not threading.main_thread():
            return
        self._process, self._over = os.getpid(), False
        self._training = TrainingFrame(training)
        for number in self._signals:
            before = signal.getsignal(number)
            if before is not None and before is not signal.SIG_IGN:
                self._before[number] = before
                signal.signal(number, self._hear)
        self._workers.begin(tuple(self._before))

    def put_back(self) -> None:
        """Stop listening: give the handlers back, where nobody has set another one since."""
        self._over = True
        self._workers.put_back()
        if threading.current_thread() is not threading.main_thread():
            return  # not to be done here; a signal that comes is passed on
        for number, before in self._before.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, before)

    def deliver(self, number: signal.Signals) -> None:
        """Stop listening, and let ``number`` do what it would have done had nobody listened."""
        self.put_back()
        for stream in (sys.stdout, sys.stderr):  # the default of most signals ends the process as it stands
            with contextlib.suppress(AttributeError, OSError, ValueError):
                stream.flush()
        if signal.getsignal(number) is signal.SIG_DFL:
            self._workers.end()  # of the process's end by a signal they would learn late
        signal.raise_signal(number)

    def tell_others(self, number: signal.Signals) -> None:
        """Stop listening, and call the handler that someone else set for ``number``, if there is one."""
        self.put_back()
        before = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, sys._getframe())

    def is_left_over(self) -> bool:
        """Whether the training that this belongs to is over, however it ended. Only the main thread can see all."""
        is_main = threading.current_thread() is threading.main_thread()
        return self._over or (is_main and not self._training.is_below(sys._getframe()))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process or self._over or not self._training.is_below(frame):
            self._do_as_before(number, frame)
        elif self.received is None:
            self.received, self._received_at = signal.Signals(number), time.monotonic()
            if number == signal.SIGINT and self._answer:
                with contextlib.suppress(OSError):
                    os.write(2, _ANSWER)  # a handler may interrupt print and logging, which must not be entered twice
        elif number == signal.SIGINT and time.monotonic() - self._received_at > _ONE_PRESS:
            self._do_as_before(number, frame)

    def _do_as_before(self, number: int, frame: FrameType | None) -> None:
        self.put_back()
        before = self._before[number]
        if callable(before):
            before(number, frame)
        else:
            # Someone who was here after us may have set a handler that calls this one.
            set_since = signal.signal(number, before)
            signal.raise_signal(number)
            signal.signal(number, set_since)


def put_back_left_over() -> None:
    """Give back the handlers that a training did not, since it was interrupted by an exception.

    Until this is called, such a handler passes every signal on. Only the main thread can do it.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in signal.valid_signals():
        watch = getattr(signal.getsignal(number), "__self__", None)
        while isinstance(watch, SignalWatch) and watch.is_left_over():
            watch.put_back()
            now = getattr(signal.getsignal(number), "__self__", None)
            watch = now if now is not watch else None


def frame_of_loop() -> FrameType | None:
    """For a generator: the frame in which it is iterated, through generators and iterators of others around it.

    As long as that frame is there, the loop may be running.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_flags & inspect.CO_GENERATOR or _is_ours(frame)):
        frame = frame.f_back
    return frame


def _is_ours(frame: FrameType) -> bool:
    own = str(frame.f_globals.get("__name__", "")).partition(".")[0] == __name__.partition(".")[0]
    return own or frame.f_code.co_name in ("__next__", "__iter__")


class TrainingFrame:
    """The frame of one training loop, or none that is known."""

    def __init__(self, frame: FrameType | None) -> None:
        self._which = None if frame is None else (id(frame), frame.f_code)

    def is_below(self, innermost: FrameType | None) -> bool:
        """Whether it has not been left by the code that ``innermost`` is the last frame of; true of an unknown one."""
        if self._which is None:
            return True
        while innermost is not None:
            if (id(innermost), innermost.f_code) == self._which:
                return True
            innermost = innermost.f_back
        return False
