"""The state of data objects, kept with the batch that it belongs to until that batch has been trained on.

Loaders are ahead of training, so at a save an object is further than the run that is resumed from it::

    made in this process     [0] [1] [2] | [3] [4]              | trained on up to here; 3 and 4 were made ahead
                                           ^B3 ^B4  ^now        what each was made from, and what the next is made from
    made in two workers      [0] [2]     | [4]     [1] [3] | [5]
                                 ^S2                   ^S3      how each worker's copy was after its last batch

Promise: each batch that comes after the place of a save is made from the state from which it was made, or would have
been, in the run without a break; what a program changes between two batches included. Orders of indices, and streams,
are run through again from the state in which the pass began; what comes of it is compared with what was saved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import get_worker_info

from hf_lifecycle.data.batch_marks import BatchMarks
from hf_lifecycle.data.objects import DataObjects, States, find_in, name_given
from hf_lifecycle.data.stream_position import Stamped, note, token_of

__all__ = ["ObjectStates", "StateRecorder", "TrackedObjects", "states_at_place", "states_of_unknown"]

_ANOTHER_BATCH = (
    "the next batch differs from the one that the run would have trained on: its rows depend on something that has "
    "changed since the save. Let dataset, collator and sampler depend only on the epoch and on plain values of their "
    "own, or give them state_dict() and load_state_dict()"
)

_RACES = (
    "examples are read in threads, and random numbers are drawn from the global generators of random, NumPy or torch "
    "at the same time: which example gets which number depends on timing. Draw in the data collator, or from a "
    "generator that is made from the example, such as random.Random(row['id'])"
)


class StateRecorder:
    """Notes states where batches are made, or their order is drawn, and gives saved ones back. Workers have copies.

    Args:
        token: Of the :class:`TrackedObjects` that is told.
    """

    def __init__(self, objects: DataObjects, token: int) -> None:
        self.objects = objects
        self._token = token
        self._place = (-1, 0)
        self._ahead: dict[int, States] = {}
        self._now: States | None = None

    def give_back(self, epoch: int, count: int, ahead: Mapping[int, States], now: States | None) -> None:
        """Let what follows on ``count`` batches of ``epoch`` be as it was; see :meth:`TrackedObjects.state_dict`."""
        self._place, self._ahead, self._now = (epoch, count), dict(ahead), now

    def before(self, epoch: int, number: int) -> None:
        """Batch ``number`` is about to be made."""
        info = get_worker_info()
        if (epoch, number) >= self._place:
            one = number if info is None else number % info.num_workers
            if one in self._ahead:
                self.objects.become(self._ahead.pop(one))
            elif info is None:
                self.settle()
        if info is None:
            note(self._token, epoch, number, self.objects.states())

    def after(self, batch: Any, epoch: int, number: int) -> Any:
        """The batch that a worker has made, with the state that its copies have now."""
        return Stamped(batch, self._token, epoch, number, self.objects.states())

    def settle(self) -> None:
        """What was made ahead at the save has been made again: the objects of this process are as they were then."""
        if self._now is not None:
            now, self._now = self._now, None
            self.objects.become(now)


class TrackedObjects:
    """The objects that make batches, or those that decide their order, and what is known of their states.

    Args:
        workers: How many processes make batches of copies; 0: this one does.
        persistent: Whether those live on from pass to pass.
        replays: Whether a resumed pass is run through from its beginning.
    """

    def __init__(self, objects: DataObjects, *, workers: int, persistent: bool, replays: bool) -> None:
        self.objects = objects
        self.workers = workers
        self.recorder = StateRecorder(objects, token_of(self))
        self._persistent = persistent
        self._replays = replays
        self._epoch = -1
        self._start: States = {}
        self._noted: dict[int, States] = {}  # by the number of a batch that was not trained on yet
        self._last: dict[int, States] = {}  # of each worker, after the last of its batches that was trained on
        self._resumed: tuple[int, Mapping[int, States], States | None] | None = None

    def beside(self, item: Any) -> list[str]:
        """Those that are other objects than ``item``."""
        return [name for name, one in self.objects.members.items() if one is not item]

    def add(self, epoch: int, number: int, states: States) -> None:
        """Batch ``number`` came with these states: from before it was made here, or after a worker made it."""
        # Invariant: read before the epoch is looked at. The thread that pins memory calls this, too, and what comes
        # late of a pass that was left must not be taken for the next one's.
        noted = self._noted
        if epoch == self._epoch:
            noted[number] = states

    def begin(self, epoch: int) -> None:
        """A pass is about to begin, at its first batch or where a run is resumed."""
        self.recorder.settle()
        self._epoch = epoch
        self.forget_before(None)
        self._noted = {}
        if self._resumed is not None:
            self.recorder.give_back(epoch, *self._resumed)
            self._resumed = None
            return
        self._start = self.objects.states()
        # Of use to workers alone that are started from here on; those that persist are as they were.
        self.recorder.give_back(epoch, 0, self._last, None)

    def lost(self) -> list[str]:
        """Objects whose state no save can have, in words."""
        if not (self.objects and self.workers and self._persistent and self._replays):
            return []
        return [
            f"{', '.join(self.objects.members)} keeps state in persistent workers of a stream, where it cannot be "
            "read at the end of a pass: set persistent_workers=False"
        ]

    def forget_before(self, count: int | None) -> None:
        """``count`` batches of the pass were trained on, or all."""
        for number in sorted(self._noted):
            if count is None or number < count:
                states = self._noted.pop(number)
                if self.workers:
                    self._last[number % self.workers] = states
        if count is None and not self._persistent:
            self._last.clear()

    def state_dict(self, count: int | None) -> dict[str, Any]:
        """States as of ``count`` batches of the pass; None: the pass is over.

        Returns:
            ``start``, as the pass began; ``now``, as the objects of this process are; and ``ahead``: what each batch
            that was made ahead was made from, by number, or how each worker's copies are, by worker.
        """
        now = self.objects.states()
        self.forget_before(count)
        if count is None:
            return {"start": now, "ahead": dict(self._last), "now": now}
        return {"start": self._start, "ahead": dict(self._last if self.workers else self._noted), "now": now}

    def load_state_dict(self, saved: Mapping[str, Any], count: int | None) -> None:
        """Let the next pass begin where ``saved`` says; see :meth:`state_dict`."""
        ahead, now = saved["ahead"], saved["now"]
        if count is None:
            self.objects.load(now)
            self._last = dict(ahead) if self._persistent else {}
            self._start, self._resumed = now, (0, self._last, None)
            return
        self._start = saved["start"]
        self.objects.load(self._start if self.workers or self._replays else ahead.get(count, now))
        self._last = dict(ahead) if self.workers else {}
        self._resumed = count, ahead, now


class ObjectStates:
    """The data objects of one loader.

    Args:
        making: Those that make batches.
        drawing: Those that decide their order, in this process.
        per_batch: How many of the batches that are made come to one that is handed out.
    """

    def __init__(self, making: TrackedObjects, drawing: TrackedObjects, *, per_batch: int, marks: BatchMarks) -> None:
        self.making = making
        self.drawing = drawing
        self.marks = marks
        self._per_batch = per_batch
        self._told_of_race = False

    @property
    def names(self) -> list[str]:
        return [*self.making.objects.members, *self.drawing.objects.members]

    def begin(self, epoch: int) -> None:
        """A pass is about to begin."""
        self.making.begin(epoch)
        self.drawing.begin(epoch)
        self.marks.begin(epoch)

    def trained(self, batches: int) -> str | None:
        """So many batches of the pass were handed out to be trained on.

        Returns:
            In words, each once: that the first batch of a resumed run is another than the run would have had; that
            what batches are like depends on timing.
        """
        if self.names:
            # What was made ahead at the save from which the run was resumed has been made again.
            self.making.recorder.settle()
            self.drawing.recorder.settle()
            self.making.forget_before(batches * self._per_batch)
            self.drawing.forget_before(batches * self._per_batch)
        differs = self.marks.trained(batches * self._per_batch)
        if self.marks.races and not self._told_of_race:
            self._told_of_race = True
            return _RACES
        return _ANOTHER_BATCH if differs else None

    def state_dict(self, batches: int | None) -> dict[str, Any] | None:
        """What a run needs that is resumed after so many batches of this pass; None: after the pass."""
        count = None if batches is None else batches * self._per_batch
        self.making.recorder.settle()
        self.drawing.recorder.settle()
        return {
            "batch": count,
            "workers": self.making.workers,
            "making": self.making.state_dict(count),
            "drawing": self.drawing.state_dict(count),
            "next": self.marks.state_dict(count),
            "unreadable": [*self.making.objects.unreadable, *self.drawing.objects.unreadable],
        }

    def load_state_dict(self, saved: Mapping[str, Any] | None, *, inside: bool) -> list[str]:
        """Begin the next pass as ``saved`` says, within it or at its first batch.

        Returns:
            What cannot be as it was, in words.
        """
        there = [] if saved is None else [*saved["making"]["now"], *saved["drawing"]["now"]]
        for side in (self.making, self.drawing):
            side.objects.leave_out([] if saved is None else saved["unreadable"])
        problems = [f"{name} has state in only one of the two runs" for name in sorted(set(self.names) ^ set(there))]
        if saved is None:
            return problems
        count = saved["batch"] if inside else None
        self.making.load_state_dict(saved["making"], count)
        self.drawing.load_state_dict(saved["drawing"], count)
        if "next" in saved:  # which 0.1 did not save
            self.marks.load_state_dict(saved["next"], count)
        if self.making.objects and saved["workers"] != self.making.workers:
            problems.append(
                f"{', '.join(self.making.objects.members)}: each worker has its own state; there were "
                f"{saved['workers']} workers at the save, and there are {self.making.workers} now: use the saved "
                "number"
            )
        return problems

    def lost(self) -> list[str]:
        """Objects whose state no save can have, in words."""
        return self.making.lost()


def states_of_unknown(
    loader: Any, given: Mapping[str, Any], refusal: Callable[[Any], str | None]
) -> tuple[ObjectStates, dict[str, str]]:
    """Those of a loader that is not taken over, each pass of which a resumed run runs through from its beginning.

    Returns:
        They, and why others cannot be kept.
    """
    found, refused = find_in(loader, given, refusal)
    making = TrackedObjects(found, workers=0, persistent=False, replays=True)
    drawing = TrackedObjects(DataObjects({}), workers=0, persistent=False, replays=True)
    return ObjectStates(making, drawing, per_batch=1, marks=BatchMarks(0)), refused


def states_at_place(saved: Mapping[str, Any] | None) -> States:
    """Of what :meth:`ObjectStates.state_dict` gave: the states, at its place, of the objects that the user named."""
    if saved is None:
        return {}
    making, drawing, count = saved["making"], saved["drawing"], saved["batch"]
    first = {} if saved["workers"] else making["ahead"].get(count, {})
    states = {**making["now"], **first, **drawing["now"], **drawing["ahead"].get(count, {})}
    return {name: state for path, state in states.items() if (name := name_given(path)) is not None}
