"""Which pass over a loader an iterator of ``batches()`` stands for, after a resume too.

A resumed program begins the body of the saved epoch anew, and does not come again to the bodies of the batches that
were trained on. So it makes again, in the same order, the iterators that it made *outside* the body of a batch, and
none of those that it made *within* one.

An iterator made outside stands for the one that was made at its place. Had that been

- open, the pass continues;
- over, it is empty: it came to its end, or was left where no other pass was at hand;
- exhausted in the body of another's batch, it is empty there, and continues with the open pass after the bodies;
- dropped in the body of another's batch, it stands for what was made there in its place;
- not asked, a new pass begins.

One made within a body begins a new pass, unless a pass that was itself made so was open at the save and no iterator
made outside stands for it: then it continues with that one. Where a program may have meant either, that is an error. A
generator made outside, which makes its iterator within a body, continues with the open pass.

What was made before the loop over epochs keeps its place over epochs; what was made within an epoch is taken to be over
at its end, unless passes over this loader have continued into the next one.

Promise: at most one pass over a loader is open, and another ends it; batches come by the pass's number.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.hosts.accelerate.iteration.asked_by import DRAINED, AskedBy, MadeIn, Pass

__all__ = ["LoaderPasses"]

Entry = Literal["new", "on", "after", "over"]  # a new pass, the open one, the same after one that was over, none

_KEYS = ("passes", "batch", "begun", "open", "ended", "left", "lone", "goes_over", "doubt")


@dataclass(slots=True)
class _Open:
    """The open pass: how its iterator was made, in an epoch that has ended, or by a generator that was made outside."""

    made: MadeIn
    index: int
    old: bool = False
    outside: bool = False


class LoaderPasses:
    """The passes over one loader.

    Args:
        warn: Told what is not exact, or may not be.
        refuse: Told where a resumed run cannot know how to continue; raises, or warns.

    Attributes:
        number: Of the pass that is open, or of the next one: so many have ended in the whole run.
        batch: Batches handed out in the pass that is open; None between passes.
        begun: Whether a pass was asked for a batch since the epoch began.
    """

    def __init__(self, name: str, warn: Callable[[str], None], refuse: Callable[[str], None]) -> None:
        self.number = 0
        self.batch: int | None = None
        self.begun = False
        self.name = name
        self._warn = warn
        self._refuse = refuse
        self._open: _Open | None = None
        self._ended: dict[str, dict[int, str]] = {"run": {}, "epoch": {}}
        self._left: set[str] = set()  # how passes made in bodies, and kept over several, have ended
        self._lone = False  # the last of them came to its end, and none was begun since
        self._goes_over: bool | None = None  # whether passes continue from one epoch into the next, once known
        self._doubt: str | None = None  # how the pass was made that was taken to be over with the epoch
        # Of this process:
        self._made: dict[str, int] = {"run": 0, "epoch": 0}
        self._unasked: list[weakref.ref[Pass]] = []
        self._live: Pass | None = None
        self._is_orphan = False  # the open pass waits, and the bodies in which it was asked do not come again
        self._replays_lone = False
        self._was_exhausted = False  # an iterator that was over was asked within a body since the resume

    @property
    def is_live(self) -> bool:
        """Whether an iterator of this process is open."""
        return self._live is not None

    @property
    def waits(self) -> bool:
        """Whether a pass was open at the save, and no iterator has continued with it yet."""
        return self.batch is not None and self._live is None

    @property
    def in_hand(self) -> int:
        """Batches handed out in the open pass, unless an earlier epoch has left it."""
        return 0 if self._open is None or self._open.old else self.batch or 0

    # Transitions

    def make(self, made: MadeIn, *, by: AskedBy) -> Pass:
        """An iterator is made; it has not been asked yet."""
        index = -1
        if made != "body":
            index = self._made[made]
            self._made[made] += 1
        one = Pass(made, index, by)
        if made == "run":
            self._unasked = [ref for ref in self._unasked if ref() is not None] + [weakref.ref(one)]
        return one

    def enter(self, one: Pass, *, within: bool) -> Entry:
        """An iterator is asked for its first batch; ``within``: in the body of another's. It ends one that is open."""
        if self._live is not None and self._live.leave is not None:
            self._live.leave()
        self._unasked = [ref for ref in self._unasked if ref() is not one]
        if self._is_orphan and one.by != "older generator":
            self._close()
        entry = self._entry(one, within=within)
        if entry == "over":
            return entry
        if entry == "new":
            if self.waits:
                self._close()
            self.batch = 0
        is_old = entry != "new" and self._open is not None and self._open.old and one.made == "body"
        self._open = _Open(one.made, one.index, is_old, one.by == "older generator")
        if one.made != "body":
            self._ended[one.made].pop(one.index, None)
        self._live, self.begun, self._is_orphan = one, True, False
        self._lone = self._replays_lone = self._was_exhausted = False
        self._doubt = None
        return entry

    def _entry(self, one: Pass, *, within: bool) -> Entry:
        if one.made == "body":
            return self._entry_in_body(one)
        state = self._ended[one.made].get(one.index)
        takes_its_place = self.waits and self._open is not None and self._open.made == "body"
        if state == "over" or (state == "exhausted" and not (takes_its_place and not within)):
            self._was_exhausted |= within
            return "over"
        if not self.waits or self._open is None:
            return "new" if state is None else "over"  # what took its place has ended
        if self._open.old or (takes_its_place and one.by == "older generator"):
            return "on"
        is_it = (self._open.made, self._open.index) == (one.made, one.index)
        return "on" if is_it or (state is not None and takes_its_place) else "new"

    def _entry_in_body(self, one: Pass) -> Entry:
        if not self.waits or self._open is None:
            if self._replays_lone:
                self._replays_lone = False
                remade = one.by == "generator" and "dropped" in self._left
                return "new" if remade or self._has_stand_in() else "over"
            if self._doubt == "body":
                self._warn(
                    f"maybe not exact: {self.name}: an iterator over it was open at the end of the epoch, and another "
                    "starts here; to continue it, create it before the loop over epochs; else close() it before save()"
                )
            return "new"
        if self._was_exhausted:
            return "after"
        if self._open.made != "body" and not self._open.old:
            return "new"  # the iterator that stands for it was made again, and is given up here
        if self._has_stand_in():
            return "new"  # the same
        if one.by != "older generator" and (self._open.outside or self._left == {"dropped"}):
            return "new"
        if one.by == "function" and self._left != {"exhausted"}:
            self._refuse(
                f"{self.name}: an iterator that was created in the body of a batch was open at the save, and it is "
                "unknown whether the iterator created here continues it or starts from the beginning: create it "
                "before the loop over batches, or close() it before save()"
            )
        return "on"

    def asked(self, one: Pass) -> None:
        """The iterator is asked for another batch."""
        self.begun = True
        if one is not self._live or self._open is None or not self._open.old or self._goes_over:
            return
        self._goes_over = True
        if self._doubt is not None:
            self._doubt = None
            self._warn(
                f"not exact: {self.name}: an iterator over it continues from one epoch into the next, but the "
                "checkpoint at the end of the epoch assumed that it had ended; create it before the loop over epochs"
            )

    def other_was_asked(self) -> None:
        """The pass in whose bodies this one is asked was asked for its next batch."""
        if self._live is not None:
            self._live.outlived = True

    def end(self, one: Pass, *, exhausted: bool, within: bool, kept: bool) -> None:
        """The iterator is done with.

        Args:
            exhausted: Its batches came to their end; else it was left.
            within: In the body of another's batch.
            kept: The pass is only put off.
        """
        opened = self._open
        assert one is self._live
        assert opened is not None
        self._live = None
        if kept:
            return
        self._close()
        if opened.old and self._goes_over is None:
            self._goes_over = False
        if one.made == "run" or (one.made == "epoch" and not opened.old):
            self._ended[one.made][one.index] = "over" if not within else "exhausted" if exhausted else "dropped"
        elif one.made == "body" and one.outlived and within:
            self._left.add("exhausted" if exhausted else "dropped")
            self._lone = exhausted
        elif one.made == "body" and one.by != "function" and exhausted and not within:
            self._warn(DRAINED % self.name)

    def _close(self) -> None:
        self.batch, self._open, self._is_orphan = None, None, False
        self.number += 1

    def outer_ended(self, *, in_epochs: bool) -> None:
        """The pass in whose bodies this one's iterators were asked has ended: those bodies do not come again."""
        stands, opened = self._has_stand_in(), self._open
        if self.waits and opened is not None and (opened.made, opened.old) == ("body", False) and not stands:
            self._is_orphan = True  # nothing has continued with it; a generator that was made outside may yet
        if opened is not None and opened.made == "body" and stands:
            return  # what is left of it may be asked for where the iterator was made
        for made in ("epoch",) if in_epochs else ("epoch", "run"):
            self._ended[made] = dict.fromkeys(self._ended[made], "over")

    def _has_stand_in(self) -> bool:
        """Whether an iterator made outside stands for one that was made in a body in its place."""
        return any(state != "over" for states in self._ended.values() for state in states.values())

    def begin_again(self) -> None:
        """The epoch's body is begun anew, after max_steps for example: its iterators are made again."""
        self._made["epoch"], self._was_exhausted, self._replays_lone = 0, False, self._lone

    def begin_epoch(self) -> None:
        """An epoch is over."""
        self._ended["epoch"] = {}
        self._lone = self.begun = False
        self.begin_again()
        opened = self._open
        if (
            opened is not None
            and not self._is_orphan
            and opened.made != "run"
            and not (opened.made == "body" and self._keeps_over())
        ):
            opened.old = True
            self._let_go()

    def _keeps_over(self) -> bool:
        """Whether a pass begun in a body took the place of an iterator that was made before the loop over epochs."""
        return any(state != "over" for state in self._ended["run"].values())

    def _let_go(self) -> None:
        """End a pass that an earlier epoch has left and that nobody holds, unless passes are known to continue."""
        if self.waits and self._open is not None and self._open.old and not self._goes_over:
            self._doubt = self._open.made if self._goes_over is None else None
            self._close()

    # State

    def state_dict(self, *, epoch_is_over: bool) -> dict[str, Any]:
        """What a resumed run needs; ``epoch_is_over``: as of the next epoch's start."""
        state = self._state()
        saved = LoaderPasses(self.name, self._warn, self._refuse)
        saved.load_state_dict(state)
        if epoch_is_over:
            saved.begin_epoch()
        if saved._doubt is not None:
            self._doubt = saved._doubt  # what is saved here may be seen to be wrong
        return saved._state()

    def _state(self) -> dict[str, Any]:
        opened = self._open
        return {
            "passes": self.number,
            "batch": self.batch,
            "begun": self.begun,
            "open": None if opened is None else asdict(opened),
            "ended": {made: dict(states) for made, states in self._ended.items()},
            "left": sorted(self._left),
            "lone": self._lone,
            "goes_over": self._goes_over,
            "doubt": self._doubt,
        }

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Be where a checkpoint says, which may not know the loader. Iterators that were not asked yet stay."""
        state = LoaderPasses(self.name, self._warn, self._refuse)._state() if state is None else state
        opened = state["open"]
        self.number, self.batch, self.begun = state["passes"], state["batch"], state["begun"]
        self._open = None if opened is None else _Open(**opened)
        self._ended = {made: dict(states) for made, states in state["ended"].items()}
        self._left, self._lone = set(state["left"]), state["lone"]
        self._goes_over, self._doubt = state["goes_over"], state["doubt"]
        self._live = None
        waiting = [iterator for ref in self._unasked if (iterator := ref()) is not None]
        for index, iterator in enumerate(waiting):
            iterator.index = index
        self._made["run"] = len(waiting)
        self.begin_again()
        self._let_go()

    @staticmethod
    def require(state: Mapping[str, Any]) -> None:
        """Raise unless ``state`` is a loader's position."""
        if wrong := set(_KEYS) ^ set(state):
            raise StateMismatch("a loader's position", sorted(wrong - set(state)), sorted(wrong - set(_KEYS)))
