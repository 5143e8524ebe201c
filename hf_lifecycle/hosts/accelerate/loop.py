"""The loop itself: which epoch and which batch come next, and under which random numbers.

What is kept, drawn as a loop runs::

    for epoch in epochs(3):            epoch begins; after a break, at the saved one
        for batch in batches(loader):  after a break, at the saved batch; training's generators restored
            ...                        training draws from the generators, nothing else does
            save()                     (epoch, passes and batches of each loader, steps) and the generators
        ...                            evaluation
        save()                         the epoch is over: the next one is what a resumed run begins with

Between a save and the next batch others may draw; the generators are then put back to what was saved. A save
is possible where nothing is in flight, at a step boundary (:meth:`Loop.at_boundary`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.hosts.accelerate.iteration.asked_by import AskedBy, MadeIn, Pass
from hf_lifecycle.hosts.accelerate.iteration.left_by_error import BEGINS_AGAIN, LEFT_BY_ERROR, LeftByError
from hf_lifecycle.hosts.accelerate.iteration.loaders import Loaders, TrackedLoader
from hf_lifecycle.hosts.accelerate.iteration.nesting import AFTER_EPOCH_END, SUPERSEDED, Nesting
from hf_lifecycle.hosts.accelerate.iteration.steps import Steps
from hf_lifecycle.hosts.accelerate.progress import Progress
from hf_lifecycle.state.rng.states import RngState, capture_rng, restore_rng

__all__ = ["Loop"]

logger = logging.getLogger("hf_lifecycle")
_KEYS = ("epoch", "step", "ended", "interrupted", "within", "loaders")


class Loop:
    """Iterates epochs and batches, and knows where it is.

    Args:
        seed: Of the data's streams.
    """

    def __init__(self, accelerator: Any, loaders: Loaders, seed: int, has_stopped: Callable[[], bool]) -> None:
        self.loaders = loaders
        self.steps = Steps(accelerator, lambda: self._nesting.outermost is not None)
        self.progress = Progress(self.steps, loaders)
        self.seed = seed
        self.at_pass: list[Callable[[bool], None]] = []  # called before a pass, or the rest of one (True), begins
        self.at_batch: list[Callable[[int, int, int], None]] = []  # called with (its seed, pass, number) before a body
        self.at_body_end: list[Callable[[], None]] = []  # called when it is done; both of the outermost pass
        self.at_boundary: list[Callable[[], None]] = []  # called after each optimizer step, before the next batch
        self.at_epoch: list[Callable[[], None]] = []  # called when an epoch's body is done
        self.at_end: list[Callable[[], None]] = []  # called when there are no more epochs
        self.leaving = False  # a signal ends the loop here, to be continued with
        self.interrupting = False  # the save that is made is for a signal: the uninterrupted run makes none here
        self._has_stopped = has_stopped
        self._accelerator = accelerator
        self._max_steps: int | None = None
        self._in_epochs = self._in_evaluation = False
        self._limited = False  # the pass at hand was left because of max_steps, a signal or early stopping
        self._ended = False  # the loop over epochs was left by break before a save
        self._error = LeftByError(lambda: self._in_epochs)
        self._nesting = Nesting(loaders.every_passes)
        self._epoch_was_saved = False
        self._loads = 0  # an iterator from before a load must not continue after it
        self._saved_rng: RngState | None = None  # to be restored before training continues
        self._interrupted: str | None = None  # by a signal, "within" an epoch or "between" two, or by an "error"

    # Iteration

    def epochs(self, count: int, max_steps: int | None) -> Iterator[int]:
        """The epochs that are left of ``count``."""
        if self._in_epochs:
            raise RuntimeError("epochs(): a loop over epochs is already running, and cannot be nested")
        if (left := self._error.place) is not None:  # the program tries again
            logger.warning(BEGINS_AGAIN)
            self._be_at(left)
        self._in_epochs, self._max_steps, loads = True, max_steps, self._loads
        self.loaders.begin_epochs()
        try:
            while self.progress.epoch < count and not (self._is_at_limit() or self._ended or self._has_stopped()):
                self._limited = False
                self._error.forget()
                self.loaders.begin_again()
                self._put_back(forget=self._interrupted == "between")
                yield self.progress.epoch
                self._refuse_stale(loads)
                self._end_epoch()
            self._error.forget()
            for notify in self.at_end:
                notify()
        except GeneratorExit:
            if not self._error.closing(lambda: self.state_dict(epoch_is_over=self.epoch_is_over())):
                self._ended = not self._has_stopped()
                if not self._ended and loads == self._loads:  # where early stopping continues, the next epoch follows
                    self._count_epoch()
            raise
        finally:
            self._in_epochs = False

    def _is_at_limit(self) -> bool:
        return self.leaving or (self._max_steps is not None and self.steps.count >= self._max_steps)

    def _end_epoch(self) -> None:
        for notify in self.at_epoch:
            notify()
        problem = None if self._limited else self._nesting.epoch_ended()
        self.steps.settle()
        self._count_epoch()
        if problem is not None:
            raise RuntimeError(problem)

    def _count_epoch(self) -> None:
        if self._limited:  # the epoch is not over: with a higher limit, it continues
            return
        self.progress.epoch += 1
        self._epoch_was_saved = False
        self.loaders.begin_epoch()

    def batches(self, loader: Any, name: str | None, *, by: AskedBy) -> Iterator[tuple[int, Any]]:
        """What is left of a pass over ``loader``, numbered from 0. ``by``: what of the user's asks."""
        if self._in_evaluation:
            raise RuntimeError("batches() cannot be used within evaluating(); iterate the loader directly there")
        passes = self.loaders.passes_of(loader, name)
        made: MadeIn = "body" if self._nesting.outermost is not None else "epoch" if self._in_epochs else "run"
        return self._asked(loader, name, passes.make(made, by=by))

    def _asked(self, loader: Any, name: str | None, one: Pass) -> Iterator[tuple[int, Any]]:
        if self._epoch_was_saved:
            self._epoch_was_saved = False
            logger.warning(AFTER_EPOCH_END)
        tracked = self.loaders.get(loader, name, self.seed)
        while True:
            entry = tracked.passes.enter(one, within=self._nesting.outermost is not None)
            self._nesting.asked_first(tracked, has_batches=entry != "over", steps=self.steps.count)
            if entry == "over":
                return
            self.steps.watch()
            self.loaders.leave_others_alone()
            for begin in self.at_pass:
                begin(entry != "new")
            came = yield from self._pass(tracked, one, tracked.batches(inside=entry != "new"))
            if came or entry != "after":  # else the pass that was resumed had just come to its end
                return

    def _pass(self, tracked: TrackedLoader, one: Pass, batches: Any) -> Generator[tuple[int, Any], None, bool]:
        """The batches of a pass. Returns whether there were any."""
        loads, limited, exhausted, came = self._loads, False, False, False
        one.leave = lambda: self._end_pass(tracked, one, batches)
        self._error.forget()
        try:
            for number, batch in batches:
                came = True
                tracked.accumulation.follows(number)
                self._nesting.handed_out(tracked, self.steps.settle(has_batch=True))
                self._put_back(forget=True)
                for begin in self.at_batch if self._nesting.is_outermost(tracked) else ():
                    begin(tracked.seed, tracked.passes.number, number)
                yield number, batch
                self._refuse_stale(loads)
                if one.leave is None:
                    raise RuntimeError(SUPERSEDED % tracked.name)
                for notify in self.at_body_end if self._nesting.is_outermost(tracked) else ():
                    notify()
                self._nesting.asked(tracked)
                tracked.passes.asked(one)
                if self._nesting.is_outermost(tracked) and self._nesting.steps_in(tracked, self.steps.count):
                    tracked.accumulation.stepped(number)
                    for notify in self.at_boundary:
                        notify()
                if limited := self._is_at_limit():
                    self._nesting.warn_of_rest(tracked)
                    return came
            exhausted = True
            tracked.accumulation.ended()
            self._put_back(forget=True)
        except GeneratorExit:
            limited = self._limited or (self._in_epochs and self._has_stopped())  # under other limits, it continues
            if one.leave is not None:
                self._error.closing(lambda: self.state_dict(epoch_is_over=False))
            raise
        finally:
            if one.leave is not None and loads == self._loads:
                self._end_pass(tracked, one, batches, exhausted=exhausted, kept=limited)
                self.steps.settle()
                self._limited |= limited
            batches.close()
        return came

    def _end_pass(
        self, tracked: TrackedLoader, one: Pass, batches: Any, *, exhausted: bool = False, kept: bool = False
    ) -> None:
        one.leave = None
        batches.close()
        within, in_epochs = self._nesting.is_within_another(tracked), self._in_epochs
        tracked.passes.end(one, exhausted=exhausted, within=within, kept=kept)
        steps = self.steps.count
        self._nesting.end(tracked, steps=steps, was_left=not exhausted, kept=kept, in_epochs=in_epochs)
        tracked.leave_accelerate()

    def _refuse_stale(self, loads: int) -> None:
        if loads != self._loads:
            raise RuntimeError("a checkpoint was loaded within the loop: start the loops over epochs and batches again")

    # Random numbers

    def _put_back(self, *, forget: bool = False) -> None:
        """Set the generators as they were saved. ``forget``: training draws from them from here on."""
        if self._saved_rng is None:
            return
        restore_rng(self._saved_rng)
        if forget:
            self._saved_rng = self._interrupted = None

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Leave the generators as they were found."""
        before, nested = capture_rng(), self._in_evaluation
        self._in_evaluation = True
        try:
            yield
        finally:
            self._in_evaluation = nested
            restore_rng(before)

    # Saving and loading

    def obstacle_to_saving(self) -> str | None:
        """Why training cannot be saved at this place, and where it can; None if it can."""
        if self._in_evaluation:
            return "save() cannot be called within evaluating(); call it after that block"
        return self.steps.amid_accumulation() if self._error.place is None else None

    def is_before_step(self) -> bool:
        """Whether no optimizer has stepped on the batch at hand, in whose body the program is."""
        return self.steps.knows and self._nesting.steps_since_batch(self.steps.count) == 0

    def epoch_is_over(self) -> bool:
        """Whether a save at this place is one at an epoch's end."""
        outside = self._nesting.outermost is None and self._error.place is None
        return outside and self._in_epochs and not self._limited and self.loaders.begun_in_epoch

    def state_dict(self, *, epoch_is_over: bool) -> dict[str, Any]:
        """Where training is: what a resumed run begins with."""
        if (left := self._error.place) is not None:
            return {**left, "interrupted": "error"}
        return {
            "epoch": self.progress.epoch + epoch_is_over,
            "step": self.steps.count,
            "ended": self._ended,
            "interrupted": self._interruption(epoch_is_over=epoch_is_over),
            "within": None if epoch_is_over else self._nesting.outermost,
            "loaders": self.loaders.state_dict(epoch_is_over=epoch_is_over, on_step=self.steps.trained),
        }

    def _interruption(self, *, epoch_is_over: bool) -> str | None:
        if not self.interrupting:
            return None
        return "between" if epoch_is_over else "within"

    def return_to_saved(self) -> bool:
        """Set the generators as they were at a save from which training has not continued. Whether there is one.

        The run continues from that save's generators, whatever drew since: so does a save that is made here.
        """
        if self._saved_rng is None or self._interrupted is not None:
            return False
        restore_rng(self._saved_rng)
        return True

    def was_captured(self, rng: RngState, *, epoch_is_over: bool) -> None:
        """Note that a save, into whichever folder, has these generators, and that a resumed run continues from here."""
        if self._error.place is not None:
            logger.warning("not exact: step %d is %s", self.steps.count, LEFT_BY_ERROR)
        self.steps.tell_at_save(before_step=self.is_before_step())
        self._saved_rng = rng
        self._interrupted = self._interruption(epoch_is_over=epoch_is_over)
        self._epoch_was_saved |= epoch_is_over
        if not self.interrupting:
            self._nesting.saved(f"step {self.steps.count}", epoch_is_over=epoch_is_over)

    @contextmanager
    def trying_to_save(self) -> Iterator[None]:
        """Around a save. One that comes to nothing decides nothing of what may follow.

        Its generators stay: a run that continues over it is one with the run in which the save was made.
        """
        before = self._epoch_was_saved, self._nesting.due
        try:
            yield
        except BaseException:
            self._epoch_was_saved, self._nesting.due = before
            raise

    def load_state_dict(self, state: Mapping[str, Any], rng: RngState) -> None:
        """Be where a checkpoint says; ``StateMismatch`` if keys are missing or unknown, and nothing changed."""
        if wrong := set(_KEYS) ^ set(state):
            raise StateMismatch("the loop's position", sorted(wrong - set(state)), sorted(wrong - set(_KEYS)))
        self._be_at(state)
        self.steps.set(state["step"])
        self._loads += 1
        self._saved_rng, self._interrupted = rng, state["interrupted"]
        self._put_back()

    def _be_at(self, state: Mapping[str, Any]) -> None:
        self.loaders.load_state_dict(state["loaders"])
        self.progress.epoch, self._ended = state["epoch"], state["ended"]
        self._limited = self._epoch_was_saved = False
        self._error.forget()
        self._nesting.resumed(state["within"])

    def close(self) -> None:
        """Give back what was taken over."""
        self.steps.close()
        self.loaders.give_back()
