"""Processes to send real signals to: forked from the tests, so that torch is imported once."""

from __future__ import annotations

import os
import pickle
import time
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["in_child", "to_group"]


def in_child(work: Callable[[], object]) -> tuple[int, Any]:
    """Fork and run ``work``. Returns how the process ended (negative: by that signal), and what ``work`` returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        status = 1
        try:
            answer = pickle.dumps(work())
            os.write(writing, answer)
            status = 0
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001  the parent sees the status, and pytest the text
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as pipe:
        answer = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), pickle.loads(answer) if answer else None


def to_group(number: int) -> None:
    """Send this process and all others of its group a signal, from outside: what torch takes for the training's own."""
    group, child = os.getpid(), os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.killpg(group, number)
        os._exit(0)
    os.waitpid(child, 0)
    time.sleep(0.05)  # until all have heard it, and torch has heard of the workers that died
