"""Faults of the disk for saves in the background."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from hf_lifecycle.saving.files import direct

__all__ = ["fail_writes"]


def fail_writes(monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Let the next writes in the background fail as on a full disk."""
    real, left = direct.write_whole, [times]

    def write(descriptor: int, data: Any) -> None:
        if left[0] > 0:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor, data)

    monkeypatch.setattr(direct, "write_whole", write)
