"""The passes over loaders that are open at once, and in which order a loop asks them for batches.

A program that is resumed comes to its loops anew, and asks first the pass that it opened first. So a save is of a place
from which the run goes on only if that pass is asked next::

    for a in batches(first):                for a in batches(first):
        for b in batches(second):               b = next(seconds)
            ...                                 ...
            save()   # second is asked next         save()   # first is asked next
        save()       # first is asked next

What is asked next is known when it is asked: then a save at the wrong place is an error.

A resumed run asks again for the passes that an epoch has had, and not for those that began and ended in the body of one
batch of another: it does not come to that body again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Passes"]


@dataclass(slots=True)
class _Open:
    """A pass.

    Attributes:
        loader: Over what.
        around: The pass in whose body it began.
        steps: How many had been taken when it last handed out a batch.
        outlived: Whether ``around`` was asked for another batch meanwhile.
    """

    loader: Any
    around: _Open | None
    steps: int = 0
    outlived: bool = False


class Passes:
    """The open passes, in the order in which they were opened."""

    def __init__(self) -> None:
        self._open: list[_Open] = []
        self.due: tuple[_Open, str] | None = None  # what has to be asked next, since a save was made, and where it was

    def __len__(self) -> int:
        return len(self._open)

    def begin(self, loader: Any) -> None:
        """A pass over ``loader`` is opened."""
        if self.due is not None:
            raise self._misplaced(loader)
        self._open.append(_Open(loader, self._open[-1] if self._open else None))

    def handed_out(self, loader: Any, steps: int) -> None:
        """A batch of ``loader`` is about to be handed out, after so many optimizer steps."""
        self._find(loader).steps = steps

    def asked(self, loader: Any) -> None:
        """``loader`` is asked for its next batch.

        Raises:
            RuntimeError: A save was made where another pass would be asked next by a resumed run.
        """
        if self.due is not None and self.due[0].loader is not loader:
            raise self._misplaced(loader)
        self.due = None
        asked = self._find(loader)
        for one in self._open:
            one.outlived |= one.around is asked

    def is_outermost(self, loader: Any) -> bool:
        """Whether it was opened before the others, so that a run can be resumed where it is asked."""
        return self._open[0].loader is loader

    def steps_in(self, loader: Any, steps: int) -> int:
        """How many of ``steps`` were taken since ``loader`` handed out its batch."""
        return steps - self._find(loader).steps

    def steps_in_innermost(self, steps: int) -> int:
        """The same of the pass opened last."""
        return steps - self._open[-1].steps

    def saved(self, place: str) -> None:
        """A save was made here, within the bodies of the open passes."""
        self.due = (self._open[0], place) if self._open else None

    def end(self, loader: Any) -> bool:
        """The pass is over. Returns whether a resumed run comes to it again."""
        ended = self._find(loader)
        self._open.remove(ended)
        if self.due is not None and self.due[0] is ended:
            self.due = None
        return ended.outlived or ended.around not in self._open

    def forget_save(self) -> None:
        """A checkpoint was loaded: what was saved before it decides nothing any more."""
        self.due = None

    def _find(self, loader: Any) -> _Open:
        return next(one for one in self._open if one.loader is loader)

    def _misplaced(self, loader: Any) -> RuntimeError:
        assert self.due is not None
        (asked_next, place), self.due = self.due, None
        outer = asked_next.loader.name
        return RuntimeError(
            f"batches(): save() at {place} was made in the body of a batch of {outer}, and {loader.name} is "
            f"asked for a batch before {outer} is: a resumed run would begin with the next batch of {outer} and leave "
            "out the rest of this one's body, so that checkpoint is not exact; put save() where nothing of the body of "
            "the outer loop is left"
        )
