"""Whether a resumed training is about to do once more what its own code has ended it by.

A program may catch what ``train()`` raises and resume, with a count of its attempts in a callback. That count is of the
process: restored at each resume, it would never grow, and an exact resume raises the same again for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hf_lifecycle.hosts.trainer.intercept import EPOCH
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, on_exception
from hf_lifecycle.libraries import lies_with_user

__all__ = ["Retries"]


class Retries:
    """What ended the trainings of one callback in this process."""

    def __init__(self) -> None:
        self._began_from: Path | None = None
        self._is_raised_by_user = False
        self._ours = MethodPatches()

    def __getstate__(self) -> dict[str, Any]:
        return {"_began_from": None, "_is_raised_by_user": False, "_ours": MethodPatches()}

    def begin(self, trainer: Any, resumed_from: Path | None) -> bool:
        """A training begins. Returns whether the one before began at the same checkpoint and a user's code raised."""
        is_again = resumed_from is not None and resumed_from == self._began_from and self._is_raised_by_user
        self._began_from, self._is_raised_by_user = resumed_from, False
        self.release()
        self._ours.replace(trainer, EPOCH, on_exception(self._note))
        return is_again

    def _note(self) -> None:
        trace = sys.exc_info()[2]
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        name = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
        self._is_raised_by_user = lies_with_user(name)

    def release(self) -> None:
        """Give the trainer its own method back."""
        self._ours.put_back()
