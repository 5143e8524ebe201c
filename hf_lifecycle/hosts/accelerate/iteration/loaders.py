"""The loaders of a loop: where in each of them training is, and that its batches do not depend on breaks.

A loader is known by its place among those that the accelerator prepared before the loop, or by the name that it is
given; one that the program makes within an epoch, by its place among those, in the order in which they are asked. Each
has its own passes, counted over the whole run, and within a pass its batches. A torch ``DataLoader``, and what
accelerate makes of one, is put under streams (:mod:`hf_lifecycle.data`). Anything else that can be iterated runs
under one stream that is held between its batches: after a break it is run through again from the pass's start, which
gives the same batches where they depend on nothing but Python's, NumPy's and torch's global generators.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from hf_lifecycle.checkpoint.files.tree import reason_to_leave_out
from hf_lifecycle.data.loader import LoaderTakeover, leave_to_others, obstacle, take_over
from hf_lifecycle.data.micro_batches import of_each_process, share_out
from hf_lifecycle.data.object_states import ObjectStates, states_of_unknown
from hf_lifecycle.data.streams import HeldStream, key_seed
from hf_lifecycle.hosts.accelerate.intercept import loaders_of
from hf_lifecycle.hosts.accelerate.iteration.accumulation import Accumulation
from hf_lifecycle.hosts.accelerate.iteration.open_iterations import LoaderPasses
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.objects import Stateful

__all__ = ["Loaders", "TrackedLoader"]

logger = logging.getLogger("hf_lifecycle")

_END = object()


class TrackedLoader:
    """One loader of the loop.

    Args:
        passes: Its passes, and what it is called in checkpoints.
        ranks: The processes of the training; all of them take the order of rank 0.
        objects: The user's objects by name, some of which may take part in making batches.
        elastic: Whether batches are made by their number among those of all ranks.
    """

    def __init__(
        self,
        loader: Any,
        passes: LoaderPasses,
        seed: int,
        ranks: Ranks,
        objects: Mapping[str, Stateful],
        *,
        elastic: bool = False,
    ) -> None:
        self.name = name = passes.name
        self.loader = loader
        self.passes = passes
        self.accumulation = Accumulation(name)
        self.obstacle = obstacle(loader, keeps_position=False)
        self.seed = seed
        self._saved_objects: Mapping[str, Any] | None = None  # to be continued with, within the pass that waits
        self._takeover: LoaderTakeover | None = None
        self.order: dict[str, Any] | None = None
        if self.obstacle is None:
            self._takeover = take_over(loader, seed=seed, rank=ranks.rank)
            own = self._takeover.fix_order()
            if elastic and (reason := share_out(self._takeover, ranks.world_size)) is not None:
                logger.warning("not exact: elastic=True: %s: %s", name, reason)
            if (
                elastic and own is not None
            ):  # accelerate seeds a sampler's generator at random, but not with one process
                own["generators"] = [key_seed((seed, "order", number)) for number in range(len(own["generators"]))]
            self.order = ranks.broadcast(own, what=f"order of {name}")
            self._takeover.fix_order(self.order)
            refused = self._takeover.carry(objects, reason_to_leave_out)
            assert self._takeover.objects is not None
            self.objects: ObjectStates = self._takeover.objects
            if elastic and (reason := of_each_process(self._takeover)) is not None:
                logger.warning("not exact: elastic=True: %s: %s", name, reason)
        else:
            self.objects, refused = states_of_unknown(loader, objects, reason_to_leave_out)
        for item, reason in refused.items():
            logger.warning("%s: %s: its state is not saved: %s", name, item, reason)
        for problem in self.objects.lost():
            logger.warning("not exact: %s: %s", name, problem)

    def resume(self, order: Mapping[str, Any] | None) -> None:
        """Go on in the order that a checkpoint, or a forerunner, had."""
        if self._takeover is not None and order is not None:
            self.order = self._takeover.fix_order(order)

    def restore(self, saved: Mapping[str, Any]) -> list[str]:
        """Go on from what a checkpoint says. Returns what of the objects cannot be as it was."""
        self.resume(saved["order"])
        self.accumulation.load_state_dict(saved["accumulation"])
        inside = self.passes.waits
        self._saved_objects = saved["objects"] if inside else None
        return self.objects.load_state_dict(saved["objects"], inside=inside)

    def batches(self, *, inside: bool) -> Generator[tuple[int, Any], None, None]:
        """The batches of the pass that begins, or of the rest of the one that was interrupted, with their numbers."""
        if self._saved_objects is not None and not inside:  # it is not continued with
            self.objects.load_state_dict(self._saved_objects, inside=False)
        self._saved_objects = None
        self.accumulation.begin(inside=inside)
        epoch, to_drop = self.passes.number, self.passes.batch or 0
        if hasattr(self.loader, "iteration"):  # accelerate's own count, by which its samplers shuffle
            self.loader.iteration = epoch
        if self._takeover is not None:
            to_drop = self._takeover.begin_epoch(epoch, skip=to_drop)
        else:
            self.objects.begin(epoch)
        batches = self._iterate(epoch)
        for _ in range(to_drop):
            if next(batches, _END) is _END:
                return
        for batch in batches:
            assert self.passes.batch is not None
            self.passes.batch += 1
            if (difference := self.objects.trained(self.passes.batch)) is not None:
                logger.warning("not exact: %s: %s", self.name, difference)
            yield self.passes.batch - 1, batch

    def _iterate(self, epoch: int) -> Iterator[Any]:
        stream = HeldStream((self.seed, "loader", epoch))
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

    def leave_accelerate(self) -> None:
        """A pass that was left by break would stay accelerate's active one."""
        if hasattr(self.loader, "gradient_state"):
            self.loader.end()

    def give_back(self) -> None:
        """Put the loader's own parts back."""
        if self._takeover is not None:
            self._takeover.give_back()


class Loaders:
    """All loaders of a loop, by name.

    Args:
        complain: Told what makes a resume inexact.
    """

    def __init__(
        self, accelerator: Any, ranks: Ranks, objects: Mapping[str, Stateful], complain: Callable[[str], None]
    ) -> None:
        self.elastic = False  # whether batches are made by their number among those of all ranks
        self._accelerator = accelerator
        self._ranks = ranks
        self._objects = objects
        self._complain = complain
        self._passes: dict[str, LoaderPasses] = {}
        self._before: int | None = None  # how many were prepared before the loop over epochs
        self._lasting: list[tuple[Any, str]] = []  # loaders without a place there, and their names: of the run
        self._of_epoch: list[tuple[Any, str]] = []  # and of the epoch at hand
        self._tracked: dict[str, TrackedLoader] = {}
        self._saved: dict[str, dict[str, Any]] = {}  # of loaders that this process has not met yet

    def passes_of(self, loader: Any, name: str | None) -> LoaderPasses:
        """The passes over the loader, which need not have been met."""
        return self._passes_called(self._name(loader) if name is None else name)

    def _passes_called(self, name: str) -> LoaderPasses:
        if name not in self._passes:
            self._passes[name] = LoaderPasses(name, logger.warning, self._complain)
        return self._passes[name]

    def every_passes(self) -> list[LoaderPasses]:
        return list(self._passes.values())

    def get(self, loader: Any, name: str | None, seed: int) -> TrackedLoader:
        """The loader as it is tracked, from now on if it was not.

        Raises:
            ValueError: Two loaders have one name.
        """
        name = self._name(loader) if name is None else name
        known = self._tracked.get(name)
        if known is not None and known.loader is loader:
            return known
        passes = self._passes_called(name)
        if known is not None and passes.is_live:
            raise ValueError(
                f"batches(): another loader with the name {name!r} is being iterated; give each loader its own name="
            )
        number = int(name.removeprefix("loader ")) if name.startswith("loader ") else name
        # Two loaders of one length must not come in one order.
        own_seed = seed if number == 0 else key_seed((seed, "loader", number))
        if known is not None:  # it may be made of the same parts
            known.give_back()
        tracked = TrackedLoader(loader, passes, own_seed, self._ranks, self._objects, elastic=self.elastic)
        saved = self._saved.pop(name, None)
        if known is not None:  # made anew within the run: it continues where its forerunner was
            tracked.resume(known.order)
        elif saved is not None:
            self._restore(tracked, saved)
        self._tracked[name] = tracked
        return tracked

    def leave_others_alone(self) -> None:
        """Let loaders that were prepared and are iterated as they are, as for an evaluation, move training alike."""
        ours = [one.loader for one in self._tracked.values()]
        for loader in loaders_of(self._accelerator):
            if not any(loader is one for one in ours):
                leave_to_others(loader)

    def _restore(self, tracked: TrackedLoader, saved: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says of a loader."""
        for problem in tracked.restore(saved):
            self._complain(f"{tracked.name}: {problem}")

    def _name(self, loader: Any) -> str:
        prepared = loaders_of(self._accelerator)
        place = next((number for number, one in enumerate(prepared) if one is loader), None)
        first = len(prepared) if self._before is None else self._before
        if place is not None and place < first:
            return f"loader {place}"
        named = [*self._lasting, *self._of_epoch]
        known = next((name for one, name in named if one is loader), None)
        if known is None:
            taken = {name for _, name in named}
            kept = (name for name, tracked in self._tracked.items() if tracked.loader is loader)
            numbers = itertools.count(0 if place is None else first)
            kind = "unprepared" if place is None else "loader"
            free = (name for number in numbers if (name := f"{kind} {number}") not in taken)
            known = next(kept, None) or next(free)
            self._of_epoch.append((loader, known))
        return known

    def begin_epochs(self) -> None:
        """The loop over epochs begins: what is met from here on may be made anew in each."""
        self._before = len(loaders_of(self._accelerator))
        self._lasting, self._of_epoch = [*self._lasting, *self._of_epoch], []
        self.leave_others_alone()

    @property
    def batches_in_open_passes(self) -> int:
        """Batches handed out in the passes that have not come to their end."""
        return sum(passes.in_hand for passes in self._passes.values())

    @property
    def begun_in_epoch(self) -> bool:
        """Whether any pass was asked for a batch since the epoch began."""
        return any(passes.begun for passes in self._passes.values())

    def begin_epoch(self) -> None:
        for passes in self._passes.values():
            passes.begin_epoch()

    def begin_again(self) -> None:
        """The epoch's body is begun anew."""
        self._of_epoch = []
        for passes in self._passes.values():
            passes.begin_again()

    def state_dict(self, *, epoch_is_over: bool, on_step: bool) -> dict[str, Any]:
        """Position, order, objects and steps of each by name.

        Args:
            epoch_is_over: As of the next epoch's start.
            on_step: Whether an optimizer has stepped on the batch at hand.
        """
        states = dict(self._saved)
        for name, one in self._tracked.items():
            states[name] = {
                "order": one.order,
                "accumulation": one.accumulation.state_dict(
                    one.passes.batch - 1 if on_step and one.passes.batch else None
                ),
            }
        for name in states:
            position = self._passes_called(name).state_dict(epoch_is_over=epoch_is_over)
            states[name] = {**states[name], "position": position}
            if name in self._tracked:
                states[name]["objects"] = self._tracked[name].objects.state_dict(position["batch"])
        return states

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint says, each loader when it is next asked for its batches.

        Raises:
            StateMismatch: A position is not one.
        """
        for state in states.values():
            LoaderPasses.require(state["position"])
        self._saved = {name: dict(state) for name, state in states.items()}
        for name in {*self._passes, *states}:
            self._passes_called(name).load_state_dict(states[name]["position"] if name in states else None)
        for name, tracked in self._tracked.items():
            saved = self._saved.pop(name, None)
            if saved is not None:
                self._restore(tracked, saved)

    def give_back(self) -> None:
        for tracked in self._tracked.values():
            tracked.give_back()
