"""In whose bodies the iterators of a loop are asked for batches, and that a resumed run can begin where one is saved.

The outermost pass is the one that was asked first, of those that are open; with its end, and with the epoch's, the next
one that is asked is. A resumed program comes to the bodies of its batches alone, and begins with the next of them. So a
save is of a place from which the run continues only if the outermost pass is asked next::

    for a in batches(first):                for a in batches(first):
        for b in batches(second):               b = next(seconds)
            ...                                 ...
            save()   # second is asked next         save()   # first is asked next
        save()       # first is asked next

What is asked next is known when it is asked: then a save at the wrong place is told. And a run that was resumed within
a pass is at fault if it never asks for it, or leaves it because another iterator has no batches, without which the run
before continued.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hf_lifecycle.hosts.accelerate.iteration.open_iterations import LoaderPasses

__all__ = ["AFTER_EPOCH_END", "SUPERSEDED", "Nesting"]

logger = logging.getLogger("hf_lifecycle")

AFTER_EPOCH_END = (
    "not exact: batches() after save() in one epoch: a save outside the loop over batches counts as the end of the "
    "epoch, so a run that is resumed from that checkpoint skips these batches; call save() at the end of the epoch's "
    "body, or call save(epoch_is_over=False), after which a resumed run repeats the code between the two loops"
)
SUPERSEDED = (
    "batches(): %s is already being iterated: another pass over it was started after this one; for two passes at "
    "once, prepare a second loader of the same data"
)


@dataclass(slots=True)
class _Open:
    """A pass over ``loader``; ``steps``: how many had been taken when it last handed out a batch."""

    loader: Any
    steps: int


class Nesting:
    """The open passes."""

    def __init__(self, every: Callable[[], Iterable[LoaderPasses]]) -> None:
        self._every = every
        self._open: list[_Open] = []
        self._outermost: _Open | None = None
        self.due: tuple[str, str] | None = None  # what has to be asked next, since a save was made, and where it was
        self._resumed_in: str | None = None  # the loader in whose pass the run was resumed, until it is asked
        self._had_none: str | None = None  # the loader of an iterator without batches, asked in this body
        self._left_after: tuple[str, str] | None = None  # a loader whose loop was left, and where it had been saved
        self._problem: str | None = None
        self._told: set[tuple[str, str]] = set()  # loaders in whose body a save was made, and what was asked further

    @property
    def outermost(self) -> str | None:
        """The loader of the outermost pass."""
        return None if self._outermost is None else str(self._outermost.loader.name)

    def asked_first(self, loader: Any, *, has_batches: bool, steps: int) -> None:
        """An iterator is asked for its first batch, after so many optimizer steps."""
        if self.due is not None:
            self._tell_misplaced(loader)
        self._tell_left()
        if not has_batches:
            self._had_none = loader.name if self._outermost is not None else None
            return
        self._open.append(_Open(loader, steps))
        self._asks(self._open[-1])

    def asked(self, loader: Any) -> None:
        """``loader`` is asked for its next batch."""
        if self.due is not None and self.due[0] != loader.name:
            self._tell_misplaced(loader)
        self.due = None
        self._asks(self._find(loader))

    def _asks(self, one: _Open) -> None:
        if self._outermost is None:
            self._outermost = one
            if self._resumed_in not in (None, one.loader.name):
                logger.warning(
                    "not exact: the checkpoint was saved in the loop over %s, and %s is iterated first now: "
                    "batches() continues at the saved batch by itself, so do not use skip_first_batches; a loader "
                    "that is created again in each epoch needs a name=",
                    self._resumed_in,
                    one.loader.name,
                )
        if self._outermost is not one:
            return
        self._had_none = None
        if self._resumed_in == one.loader.name:
            self._resumed_in = None
        for passes in self._every():
            if passes is not one.loader.passes:
                passes.other_was_asked()

    def handed_out(self, loader: Any, steps: int) -> None:
        """A batch of ``loader`` is about to be handed out, after so many optimizer steps."""
        self._find(loader).steps = steps

    def is_outermost(self, loader: Any) -> bool:
        return self._outermost is not None and self._outermost.loader is loader

    def is_within_another(self, loader: Any) -> bool:
        """Whether the iterator over ``loader`` is asked in the body of another's batch."""
        return self._outermost is not None and self._outermost.loader is not loader

    def steps_in(self, loader: Any, steps: int) -> int:
        """How many of ``steps`` were taken since ``loader`` handed out its batch."""
        return steps - self._find(loader).steps

    def steps_since_batch(self, steps: int) -> int | None:
        """The same of the batch that was handed out last; None outside the bodies of batches."""
        return None if self._outermost is None else steps - max(one.steps for one in self._open)

    def saved(self, place: str, *, epoch_is_over: bool) -> None:
        """A save was made here."""
        self._left_after = None
        within = self._outermost is not None and not epoch_is_over
        self.due = (self._outermost.loader.name, place) if within and self._outermost is not None else None

    def end(self, loader: Any, *, steps: int, was_left: bool, kept: bool, in_epochs: bool) -> None:
        """The pass is over.

        Args:
            was_left: Its batches had not come to their end.
            kept: It is only put off.
            in_epochs: Whether a loop over epochs runs.
        """
        ended = self._find(loader)
        self._open.remove(ended)
        if self._outermost is not ended:
            return
        if self.due is not None:
            self._left_after, self.due = (self.due if was_left and not kept else None), None
        self._outermost = None
        if was_left and not kept and self._had_none is not None and steps == ended.steps:
            self._problem = (
                f"not exact: the loop over {loader.name} ended because the iterator over {self._had_none} had no "
                "batches left; in the run that was saved, the loop continued. itertools.cycle replays the batches of "
                'its first pass, and a resumed run does not have them: use a generator that does "while True: yield '
                'from manager.batches(loader)"'
            )
        self._had_none = None
        if not kept:
            for passes in self._every():
                passes.outer_ended(in_epochs=in_epochs)

    def epoch_ended(self) -> str | None:
        """What is open now is asked in bodies of the next epoch, if at all. Returns why the run is not exact."""
        problem, self._problem = self._problem, None
        if self._resumed_in is not None:
            problem = (
                f"not exact: the checkpoint was saved in the loop over {self._resumed_in}, and the resumed epoch did "
                "not run that loop"
            )
        if self.due is not None:
            outer, place = self.due
            logger.warning(
                "not exact: save() at %s was called in the body of a batch of %s, whose iterator was still open at "
                "the end of the epoch, and a run that is resumed from that checkpoint continues that iterator in this "
                "epoch; use save(epoch_is_over=True), or close() the iterator first",
                *(place, outer),
            )
        self._tell_left()
        self._outermost = self.due = self._resumed_in = None
        return problem

    def _tell_left(self) -> None:
        if self._left_after is not None:
            (outer, place), self._left_after = self._left_after, None
            logger.warning(
                "not exact: save() at %s was called just before the loop over %s was left by break, and a run that "
                "is resumed from that checkpoint continues with the next batch of the loop; call save() after the "
                "loop",
                place,
                outer,
            )

    def resumed(self, within: str | None) -> None:
        """A checkpoint was loaded that was saved in a body of this loader's pass."""
        self._open, self._outermost, self.due = [], None, None
        self._had_none = self._problem = self._left_after = None
        self._resumed_in = within

    def warn_of_rest(self, loader: Any) -> None:
        """max_steps ends the loop over ``loader``."""
        if self.is_within_another(loader):
            logger.warning(
                "not exact: max_steps ended the loop over %s within another loop over batches; a run that resumes "
                "from here with more steps skips the rest of that other loop's batch",
                loader.name,
            )

    def _find(self, loader: Any) -> _Open:
        return next(one for one in self._open if one.loader is loader)

    def _tell_misplaced(self, loader: Any) -> None:
        assert self.due is not None
        (outer, place), self.due = self.due, None
        if (outer, loader.name) not in self._told:
            self._told.add((outer, loader.name))
            logger.warning(
                "not exact: save() at %s was called in the body of a batch of %s, and %s is iterated further in the "
                "same body: a run that is resumed from that checkpoint starts with the next batch of %s and skips the "
                "rest of this body; call save() at the end of the body of the outer loop",
                *(place, outer, loader.name, outer),
            )
