"""Whether another process of the training has ended, as far as that is seen from this one.

Promise: one that is said to have ended has. It is seen on the same machine, and under Linux; elsewhere nothing is said.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

__all__ = ["has_ended", "process_mark"]


def process_mark() -> str:
    """By what another process knows this one: the machine, the number, and when it began. Empty where none can be."""
    pid, machine = os.getpid(), _machine()
    began = _state_and_begin(pid)[1] if machine else ""
    return f"{machine} {pid} {began}" if began else ""


def has_ended(mark: str) -> bool:
    """Whether the process of that :func:`process_mark` has."""
    if not mark:
        return False
    machine, pid, began = mark.split()
    if machine != _machine():
        return False
    try:
        state, now = _state_and_begin(int(pid))
    except (FileNotFoundError, ProcessLookupError):
        return True
    return bool(now) and (now != began or state in ("Z", "X"))  # a zombie's parent has not asked for it yet


@functools.cache
def _machine() -> str:
    """This boot of a machine, and the namespace in which processes have their numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _state_and_begin(pid: int) -> tuple[str, str]:
    """Fields 3 and 22 of ``/proc/PID/stat`` (proc(5)); empty where they cannot be read."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except PermissionError:
        return "", ""
    return (fields[0], fields[19]) if len(fields) > 19 else ("", "")
