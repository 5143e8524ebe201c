"""The loaders of a loop: where in each of them training is, and that its batches do not depend on breaks.

A loader is known by its place among those that the accelerator prepared, or by the name that it is given. Each has its
own passes, counted over the whole run, and within a pass its batches. A torch ``DataLoader``, and what accelerate makes
of one, is put under streams (:mod:`hf_lifecycle.data`). Anything else that can be iterated runs under one stream that
is held between its batches: after a break it is run through again from the pass's start, which gives the same batches
where they depend on nothing but Python's, NumPy's and torch's global generators.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_lifecycle.accelerator.accumulation import Accumulation
from hf_lifecycle.accelerator.facts import loader_facts
from hf_lifecycle.checkpoint.tree import reason_to_leave_out
from hf_lifecycle.data.loader import LoaderTakeover, leave_to_others, obstacle, take_over
from hf_lifecycle.data.object_states import ObjectStates, states_of_unknown
from hf_lifecycle.data.streams import HeldStream, key_seed
from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.state.objects import Stateful

__all__ = ["LoaderPosition", "Loaders", "TrackedLoader"]

logger = logging.getLogger("hf_lifecycle")

_END = object()


@dataclass(slots=True)
class LoaderPosition:
    """Where training is in one loader.

    Attributes:
        passes: Passes finished in the whole run.
        in_epoch: Passes finished since the epoch began.
        batch: Batches handed out in the pass that is open; None between passes.
    """

    passes: int = 0
    in_epoch: int = 0
    batch: int | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"passes": self.passes, "in_epoch": self.in_epoch, "batch": self.batch}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> LoaderPosition:
        keys = ("passes", "in_epoch", "batch")
        missing, unknown = [key for key in keys if key not in state], [key for key in state if key not in keys]
        if missing or unknown:
            raise StateMismatch("a loader's position", missing, unknown)
        return cls(**state)


class TrackedLoader:
    """One loader of the loop.

    Args:
        name: What it is called in checkpoints.
        loader: The loader.
        seed: Of its streams.
        ranks: The processes of the training; all of them take the order of rank 0.
        objects: The user's objects by name, some of which may take part in making batches.
    """

    def __init__(self, name: str, loader: Any, seed: int, ranks: Ranks, objects: Mapping[str, Stateful]) -> None:
        self.name = name
        self.loader = loader
        self.position = LoaderPosition()
        self.accumulation = Accumulation(name)
        self.obstacle = obstacle(loader, keeps_position=False)
        self._seed = seed
        self._replayed = 0  # passes of this epoch that were finished before the break, and were asked for again
        self.resumes_inside = False
        self._takeover: LoaderTakeover | None = None
        self.order: dict[str, Any] | None = None
        if self.obstacle is None:
            self._takeover = take_over(loader, seed=seed, rank=ranks.rank)
            own = self._takeover.fix_order()
            self.order = ranks.broadcast(own, what=f"order of {name}")
            self._takeover.fix_order(self.order)
            refused = self._takeover.carry(objects, reason_to_leave_out)
            assert self._takeover.objects is not None
            self.objects: ObjectStates = self._takeover.objects
        else:
            self.objects, refused = states_of_unknown(loader, objects, reason_to_leave_out)
        for item, reason in refused.items():
            logger.warning("%s: %s: its state is not saved: %s", name, item, reason)
        for problem in self.objects.lost():
            logger.warning("not exact: %s: %s", name, problem)

    def resume(self, position: LoaderPosition, order: Mapping[str, Any] | None) -> None:
        """Go on from what a checkpoint says."""
        self.position = position
        self._replayed, self.resumes_inside = 0, position.batch is not None
        if self._takeover is not None and order is not None:
            self.order = self._takeover.fix_order(order)

    def begin_epoch(self) -> None:
        """None of the passes so far are this epoch's."""
        self.position.in_epoch = self._replayed = 0

    def was_had(self) -> bool:
        """Whether the pass that is asked for was finished in this epoch before the break."""
        if self._replayed < self.position.in_epoch:
            self._replayed += 1
            return True
        return False

    def batches(self) -> Generator[tuple[int, Any], None, None]:
        """The batches of the pass that begins, or of the rest of the one that was broken off, with their numbers."""
        had = self.position.batch if self.resumes_inside else None
        self.resumes_inside = False
        self.position.batch = had or 0
        self.accumulation.begin(inside=had is not None)
        epoch = self.position.passes
        if hasattr(self.loader, "iteration"):  # accelerate's own count, by which its samplers shuffle
            self.loader.iteration = epoch
        to_drop = had or 0
        if self._takeover is not None:
            to_drop = self._takeover.begin_epoch(epoch, skip=to_drop)
        else:
            self.objects.begin(epoch)
        batches = self._iterate(epoch)
        for _ in range(to_drop):
            if next(batches, _END) is _END:
                return
        for batch in batches:
            self.position.batch += 1
            self.objects.trained(self.position.batch)
            yield self.position.batch - 1, batch

    def _iterate(self, epoch: int) -> Iterator[Any]:
        stream = HeldStream((self._seed, "loader", epoch))
        with stream:
            batches = iter(self.loader)
            batch = next(batches, _END)
        while batch is not _END:
            yield batch
            if self._takeover is not None:  # its randomness is in streams already
                batch = next(batches, _END)
            else:
                with stream:
                    batch = next(batches, _END)

    def end_pass(self, *, goes_on: bool, comes_again: bool) -> None:
        """The pass is over, whether its batches came to an end or the loop left it.

        Args:
            goes_on: It is only put off.
            comes_again: A resumed run asks for it again in this epoch, and is to be told that it was had.
        """
        state = getattr(self.loader, "gradient_state", None)
        if state is not None:  # a pass that was left by break would stay accelerate's active one
            state._remove_dataloader(self.loader)
        if goes_on:
            self.resumes_inside = True
            return
        self.position.batch = None
        self.position.passes += 1
        self.position.in_epoch += comes_again
        self._replayed = self.position.in_epoch

    def give_back(self) -> None:
        """Put the loader's own parts back."""
        if self._takeover is not None:
            self._takeover.give_back()


class Loaders:
    """All loaders of a loop, by name.

    Args:
        accelerator: Knows those that it prepared, in their order.
        ranks: The processes of the training.
        objects: The user's objects by name.
        complain: Told what makes a resume inexact.
    """

    def __init__(
        self, accelerator: Any, ranks: Ranks, objects: Mapping[str, Stateful], complain: Callable[[str], None]
    ) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self._objects = objects
        self._complain = complain
        self._tracked: dict[str, TrackedLoader] = {}
        self._saved: dict[str, dict[str, Any]] = {}  # of loaders that this process has not met yet

    def get(self, loader: Any, name: str | None, seed: int) -> TrackedLoader:
        """The loader as it is tracked, from now on if it was not.

        Raises:
            ValueError: Two loaders have one name.
        """
        name = self._name(loader) if name is None else name
        known = self._tracked.get(name)
        if known is not None and known.loader is loader:
            return known
        if known is not None and known.position.batch is not None:
            raise ValueError(f"batches(): another loader is called {name!r} and is being iterated; give each a name=")
        number = int(name.removeprefix("loader ")) if name.startswith("loader ") else name
        # Two loaders of one length must not come in one order.
        own_seed = seed if number == 0 else key_seed((seed, "loader", number))
        tracked = TrackedLoader(name, loader, own_seed, self._ranks, self._objects)
        saved = self._saved.pop(name, None)
        if known is not None:  # made anew within the run: it goes on where its forerunner was
            known.give_back()
            tracked.resume(known.position, known.order)
        elif saved is not None:
            self._resume(tracked, saved)
        self._tracked[name] = tracked
        return tracked

    def leave_others_alone(self) -> None:
        """Let loaders that were prepared and are iterated as they are, as for an evaluation, move training alike."""
        ours = [one.loader for one in self._tracked.values()]
        for loader in self._accelerator._dataloaders:
            if not any(loader is one for one in ours):
                leave_to_others(loader)

    def _resume(self, tracked: TrackedLoader, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says of a loader."""
        tracked.resume(LoaderPosition.from_state_dict(saved["position"]), saved["order"])
        tracked.accumulation.load_state_dict(saved["accumulation"])
        for problem in tracked.objects.load_state_dict(saved["objects"], inside=tracked.resumes_inside):
            self._complain(f"{tracked.name}: {problem}")

    def _name(self, loader: Any) -> str:
        prepared = self._accelerator._dataloaders
        place = next((number for number, one in enumerate(prepared) if one is loader), None)
        if place is not None:
            return f"loader {place}"
        for name, tracked in self._tracked.items():
            if tracked.loader is loader:
                return name
        strangers = sum(name.startswith("unprepared ") for name in self._tracked)
        return f"unprepared {strangers}"

    @property
    def batches_in_open_passes(self) -> int:
        """Batches handed out in the passes that have not come to their end."""
        met = sum(tracked.position.batch or 0 for tracked in self._tracked.values())
        return met + sum(state["position"]["batch"] or 0 for state in self._saved.values())

    @property
    def begun_in_epoch(self) -> bool:
        """Whether any pass was begun since the epoch began."""
        positions = [tracked.position for tracked in self._tracked.values()]
        return any(position.in_epoch or position.batch is not None for position in positions)

    def begin_epoch(self) -> None:
        for tracked in self._tracked.values():
            tracked.begin_epoch()
        for saved in self._saved.values():
            saved["position"] = {**saved["position"], "in_epoch": 0}

    def state_dict(self, *, epoch_is_over: bool, on_step: bool) -> dict[str, Any]:
        """Position, order, objects and steps of each by name.

        Args:
            epoch_is_over: As of the next epoch's start.
            on_step: Whether an optimizer has stepped on the batch at hand.
        """
        states = dict(self._saved)
        for name, one in self._tracked.items():
            objects = one.objects.state_dict(None if epoch_is_over else one.position.batch)
            states[name] = {
                "position": one.position.state_dict(),
                "order": one.order,
                "objects": objects,
                "accumulation": one.accumulation.state_dict(
                    one.position.batch - 1 if on_step and one.position.batch else None
                ),
            }
        if epoch_is_over:
            over = {"in_epoch": 0, "batch": None}
            states = {name: {**state, "position": {**state["position"], **over}} for name, state in states.items()}
        return states

    def facts(self) -> dict[str, Any]:
        """What decides the batches of each by name."""
        return {name: loader_facts(tracked.loader) for name, tracked in self._tracked.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says, each loader when it is next asked for its batches.

        Raises:
            StateMismatch: A position is not one.
        """
        for state in states.values():
            LoaderPosition.from_state_dict(state["position"])
        self._saved = {name: dict(state) for name, state in states.items()}
        for name, tracked in self._tracked.items():
            saved = self._saved.pop(name, None)
            if saved is None:
                tracked.resume(LoaderPosition(), None)
            else:
                self._resume(tracked, saved)

    def give_back(self) -> None:
        for tracked in self._tracked.values():
            tracked.give_back()
