"""An iterator of ``batches()``, and what of a program's makes it.

A generator of the user's makes its iterator when it is first asked, which may be within the body of a batch, while the
variable that holds it was set outside. Which it was is told by the generators that lived when the first body began, of
a process or after a resume: one that is made later, at the top of another epoch, counts as made in a body.
"""

from __future__ import annotations

import gc
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType, GeneratorType
from typing import Any, Literal

__all__ = ["DRAINED", "AskedBy", "MadeIn", "OlderGenerators", "Pass"]

MadeIn = Literal["run", "epoch", "body"]  # outside the epochs, outside the bodies of batches, within one
AskedBy = Literal["function", "generator", "older generator"]  # than the first body


DRAINED = (
    "maybe not exact: %s: the rest of a generator was trained on after the loop over batches, and a run that is "
    "resumed from a later save of this epoch starts that generator from its beginning: use "
    "iter(manager.batches(loader)) instead of the generator"
)


@dataclass(eq=False)
class Pass:
    """An iterator of ``batches()``.

    Attributes:
        index: Of those made so: in the run, or in the epoch; of no meaning for those made in a body.
        outlived: Whether the pass in whose body it was asked first has been asked again meanwhile.
        leave: Ends the pass, while it is open, for another iterator over the loader.
    """

    made: MadeIn
    index: int
    by: AskedBy
    outlived: bool = False
    leave: Callable[[], None] | None = None


class OlderGenerators:
    """The generators of the program's that are older than the first body after a resume."""

    def __init__(self) -> None:
        self._known: list[weakref.ref[Any]] | None = None
        self._loops: list[weakref.ref[Any]] = []  # that ran then: the loop over batches is in them

    def loaded(self) -> None:
        """A checkpoint was loaded."""
        self._known = None

    def begin_pass(self, _: bool) -> None:
        """A pass is about to begin."""
        if self._known is None:
            every = [one for one in gc.get_objects() if type(one) is GeneratorType]
            self._known = [weakref.ref(one) for one in every if not one.gi_running]
            self._loops = [weakref.ref(one) for one in every if one.gi_running]

    def asker(self) -> AskedBy:
        """What the function of the user's is that called."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == "hf_lifecycle":
            frame = frame.f_back
        asker: AskedBy = "function"
        while frame is not None:
            if frame.f_code.co_flags & inspect.CO_GENERATOR:
                if _is_of(frame, self._loops):
                    break
                if self._known is None or _is_of(frame, self._known):
                    return "older generator"
                asker = "generator"
            frame = frame.f_back
        return asker


def _is_of(frame: FrameType, generators: Iterable[weakref.ref[Any]]) -> bool:
    return any(one is not None and one.gi_frame is frame for one in (ref() for ref in generators))
