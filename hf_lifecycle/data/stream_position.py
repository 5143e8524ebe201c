"""Where a stream is after the batches that were trained on, and how it is entered there again.

Loaders are ahead of training: one batch in the main process, several in every worker. So the state of the dataset
travels with each batch, from the process that made it; here they are kept until training has come that far.

Promise: a loader that enters a place gives the batch that follows it. Batches come from the workers in turn, the first
worker first; so each worker that had its turn in the last round makes its last batch once more, which is to be skipped,
and nothing before it is read. At most two batches of each worker, and those not yet trained on, are remembered.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from hf_lifecycle.data.objects import same_state

__all__ = ["After", "Stamped", "Start", "StreamPosition", "note", "repeated", "starts", "token_of"]


@dataclass(frozen=True, slots=True)
class After:
    """How the dataset of one process was after a batch.

    Attributes:
        state: What it calls its state.
        ended: Whether the batch was cut short by the end of the dataset.
    """

    state: Any
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Start:
    """Where one process that reads begins.

    Attributes:
        number: The number, within this process, of the first batch that it makes.
        state: The state of the dataset before it; None: as it is at the beginning of a pass.
        ended: Whether nothing is left to read.
    """

    number: int
    state: Any = None
    ended: bool = False


@dataclass(slots=True)
class Reader:
    """What is known of one process that reads.

    Attributes:
        trained: How many of its batches were trained on.
        ended: Whether it had no batch left when its turn came.
        after: How the dataset was after its batch of that number; None: nothing is known.
    """

    trained: int
    ended: bool
    after: dict[int, After | None]


class StreamPosition:
    """The place of one loader, kept in the process that trains.

    Args:
        workers: The loader's number of workers; 0: this process reads.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.token = token_of(self)
        self._epoch = 0
        self._turn = 0
        self._batches = 0
        self._readers: list[Reader] = []
        self._lost: str | None = None
        self.begin(0)

    def begin(self, epoch: int, place: Mapping[str, Any] | None = None) -> None:
        """A pass begins, at its first batch or at ``place``."""
        self._epoch, self._turn, self._batches = epoch, 0, 0
        self._readers = [Reader(0, False, {}) for _ in range(max(self.workers, 1))]
        if place is not None:
            self._turn, self._batches = place["turn"], place["batches"]
            for reader, saved in zip(self._readers, place["readers"], strict=True):
                reader.trained, reader.ended = saved["trained"], saved["ended"]
                reader.after = {number: After(*after) for number, after in saved["after"].items()}

    def add(self, epoch: int, worker: int, number: int, after: After | str) -> None:
        """A batch has arrived; ``after`` is a reason once the state is of no use."""
        # Invariant: read before the epoch is looked at. The thread that pins memory calls this, too, and what comes
        # late of a pass that was left must not be taken for the next one's.
        readers = self._readers
        if epoch != self._epoch:
            return
        known = readers[worker].after
        before = known.get(number - 1)
        known[number] = after if isinstance(after, After) else None
        if not isinstance(after, After):
            self._lost = after
        elif before is not None and not after.ended and same_state(before.state, after.state):
            self._lost = "its state is the same after two batches, so it does not contain the position"

    def trained(self) -> None:
        """The next batch was trained on."""
        # Invariant: workers are served in turn, and a batch that has come was preceded by all whose turn was before.
        # So a worker of which nothing has arrived when its turn comes has no more.
        for _ in self._readers:
            reader = self._readers[self._turn]
            self._turn = (self._turn + 1) % len(self._readers)
            if reader.trained in reader.after:
                reader.after.pop(reader.trained - 2, None)
                reader.trained += 1
                self._batches += 1
                return
            reader.ended = True
        self._lost = "a batch was trained on that did not come from its loader"

    def obstacle(self) -> str | None:
        """Why the present place cannot be entered again, or None."""
        return self._lost

    def place(self) -> dict[str, Any] | None:
        """The place after the last batch that was trained on, as plain values; None where there is an obstacle."""
        if self._lost is not None:
            return None
        readers = []
        for reader in self._readers:
            last = {n: reader.after[n] for n in range(max(reader.trained - 2, 0), reader.trained)}
            after = {n: (known.state, known.ended) for n, known in last.items() if known is not None}
            readers.append({"trained": reader.trained, "ended": reader.ended, "after": after})
        return {
            "epoch": self._epoch,
            "workers": self.workers,
            "batches": self._batches,
            "turn": self._turn,
            "readers": readers,
        }


def starts(place: Mapping[str, Any]) -> list[Start]:
    """Where each process begins to read, so that the place comes after :func:`repeated` batches."""
    again = _readers_in_turn(place)
    return [_start(reader, reader["trained"] - (index in again)) for index, reader in enumerate(place["readers"])]


def _start(reader: Mapping[str, Any], number: int) -> Start:
    if number == 0 or reader["ended"]:
        return Start(number, ended=reader["ended"])
    state, ended = reader["after"][number - 1]
    return Start(number, state, ended)


def repeated(place: Mapping[str, Any]) -> int:
    """How many batches come once more before the place is reached; at least one."""
    return len(_readers_in_turn(place))


def _readers_in_turn(place: Mapping[str, Any]) -> list[int]:
    """The processes that had their turn in the last round that was begun, and have not ended."""
    readers = place["readers"]
    return [index for index in range(place["turn"] or len(readers)) if not readers[index]["ended"]]


class Stamped:
    """A batch on its way from a worker. Where it arrives, it is the batch alone, and its state has been noted."""

    __slots__ = ("_batch", "_stamp")

    def __init__(self, batch: Any, *stamp: Any) -> None:
        self._batch, self._stamp = batch, stamp

    def __reduce__(self) -> Any:
        return _arrive, (self._batch, *self._stamp)


def _arrive(batch: Any, *stamp: Any) -> Any:
    note(*stamp)
    return batch


def note(token: int, *stamp: Any) -> None:
    """Give the receiver of ``token`` what came with a batch; one that is no longer kept is given nothing."""
    receiver = _receivers.get(token)
    if receiver is not None:
        receiver.add(*stamp)


def token_of(receiver: Any) -> int:
    """What workers call ``receiver``, whose ``add()`` is given what comes with their batches."""
    token = next(_tokens)
    _receivers[token] = receiver
    return token


_tokens = itertools.count()
_receivers: WeakValueDictionary[int, Any] = WeakValueDictionary()
