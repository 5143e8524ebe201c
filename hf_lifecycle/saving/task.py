"""A thread that hands what went wrong to whoever waits for it. No daemon: an interpreter that ends waits for it."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["Task"]


class Task(threading.Thread):
    """Runs ``work`` once, from the moment that it is made."""

    def __init__(self, work: Callable[[], object], name: str) -> None:
        super().__init__(name=name)
        self._work: Callable[[], object] | None = work
        self._failure: BaseException | None = None
        self._may_begin = threading.Lock()
        with self._may_begin:  # else who starts it gets the interpreter back only when the work lets go of it
            self.start()

    def run(self) -> None:
        with self._may_begin:
            pass
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
