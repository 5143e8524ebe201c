"""A thread that hands what went wrong to whoever waits for it. No daemon: an interpreter that ends waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Task"]


_LONGEST_HELD = 1.0  # seconds: whatever keeps its maker from letting it begin, it is done


class Task(threading.Thread):
    """Runs ``work`` once.

    Args:
        work: What to do.
        name: Of the thread.
        held: Whether it is to begin only when it is let (:meth:`begin`), or waited for. A thread that runs Python takes
            the interpreter from one that does, for milliseconds at a time.
    """

    def __init__(self, work: Callable[[], object], name: str, *, held: bool = False) -> None:
        super().__init__(name=name)
        self._work: Callable[[], object] | None = work
        self._failure: BaseException | None = None
        self._may_begin = threading.Event()
        self.start()
        if not held:
            self.begin()

    def begin(self) -> None:
        """Let it begin, if it has not."""
        self._may_begin.set()

    def join(self, timeout: float | None = None) -> None:
        self.begin()
        super().join(timeout)

    def run(self) -> None:
        self._may_begin.wait(_LONGEST_HELD)
        assert self._work is not None
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised by failure's reader, on a thread that can act on it
            self._failure = error
        finally:
            self._work = None  # with all that it holds

    def failure(self) -> BaseException | None:
        """Wait for the end, and tell what went wrong; once."""
        self.join()
        failure, self._failure = self._failure, None
        return failure
