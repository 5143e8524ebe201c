"""What makes batches: its objects with a state, and plain values in it that a user's code changes while it trains.

A dataset, a collator or a sampler with a state is ahead of training, by the batches that were fetched ahead. It is
saved as it was when the last batch that was trained on was made. What is noted with each batch, and how it is given
back, is :mod:`hf_lifecycle.data.object_states`; here is when.

Plain values are relabelled rows, a cache, weights. What a save finds of them is not always what the next batch was made
with. It is where it has not changed since: within the step; within the epoch for an order, which is drawn when the
epoch begins, and with workers, which are started then. Else that is said. A cache that has grown holds all that the
next batch was made with.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

from hf_lifecycle.bytecode import names_stored_in
from hf_lifecycle.checkpoint.files.tree import reason_to_leave_out
from hf_lifecycle.data.generators import find_generators
from hf_lifecycle.data.object_states import ObjectStates, states_at_place
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness
from hf_lifecycle.libraries import library_of
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.reachable import attributes_of, is_of_library
from hf_lifecycle.state.values.additions import Seed, seeds_of_sampler
from hf_lifecycle.state.values.attributes import Look, look
from hf_lifecycle.state.values.marks import has_only_grown
from hf_lifecycle.state.values.places import Place
from hf_lifecycle.state.values.trees import PLAIN_SCALARS

__all__ = ["DataState", "DataValues", "is_of_data"]

logger = logging.getLogger("hf_lifecycle")


class DataState(Component):
    """Notes the states of data objects, and gives them back.

    Args:
        objects: The user's objects by name, some of which may take part in making batches.
    """

    key = "data_objects"

    def __init__(self, position: Position, randomness: Randomness, objects: Mapping[str, Stateful]) -> None:
        self._position = position
        self._randomness = randomness
        self._objects = objects
        self._saved: dict[str, Any] | None = None
        self._is_resumed = False

    @property
    def _states(self) -> ObjectStates | None:
        return None if self._randomness.loader is None else self._randomness.loader.objects

    def state_dict(self) -> dict[str, Any]:
        position, states = self._position, self._states
        over = position.closed and not position.stopped
        return {"loader": None if states is None else states.state_dict(None if over else position.batches)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "loader")
        self._saved, self._is_resumed = state["loader"], True

    def states_at_place(self) -> dict[str, Any]:
        """The states, by the user's names, of objects that came with the batch that was trained on last."""
        return states_at_place(self.state_dict()["loader"])

    def prepare(self) -> tuple[list[str], list[str]]:
        """Look for data objects, and give back what was saved of them.

        Returns:
            What is not as it was in the run that saved, and what no save can have.
        """
        loader = self._randomness.loader
        if loader is None:
            return [], []
        for name, reason in loader.carry(self._objects, reason_to_leave_out).items():
            logger.warning("%s: its state is not saved: %s", name, reason)
        assert loader.objects is not None
        differences = []
        if self._is_resumed:
            differences = loader.objects.load_state_dict(self._saved, inside=self._position.resumed_inside)
        return differences, loader.objects.lost()

    def _tell_trained(self, _: Event) -> None:
        if self._states is not None and (difference := self._states.trained(self._position.batches)) is not None:
            logger.warning("not exact: %s", difference)

    on_step_begin = on_substep_end = on_step_end = _tell_trained


_OF_TRAINER = ("train_dataset", "data_collator")
_SAMPLER = "sampler"
_OF_DATA = frozenset({*_OF_TRAINER, _SAMPLER, "loader"})


class DataValues:
    """Finds them, and knows which of them a save has as the next batch was made with.

    Args:
        randomness: Has taken over its loader, where that could be.

    Attributes:
        are_carried: Whether a save can have them.
        generators: Those that are seeded with every batch or epoch, and are no values.
    """

    def __init__(self, trainer: Any, randomness: Randomness) -> None:
        self._trainer = trainer
        self._loader = randomness.loader
        self._has_workers = trainer.args.dataloader_num_workers > 0
        self._lives_on = self._has_workers and trainer.args.dataloader_persistent_workers
        # A stream is read again from its begin on a resume, and changes again on the way what it had changed.
        self.are_carried = self._loader is not None and not self._loader.iterable and not self._lives_on
        self.generators = [] if self._has_workers else self._seeded()
        self._first = {} if self.are_carried else look(self._roots(), self.generators).marks
        self._before: dict[str, Any] = {}  # the marks of those that are, as the batches to come find them

    def _seeded(self) -> list[Any]:
        """The generators that are seeded with every batch or epoch, in this process."""
        found = (find_generators(root, "", make=False) for _, root, _ in self._roots())
        return [one for each in found for one in each.values() if one is not None]

    def seeds(self) -> Iterator[Seed]:
        """Where those are that are carried."""
        if self.are_carried:
            yield from self._roots()

    def _roots(self) -> Iterator[Seed]:
        for name in _OF_TRAINER:
            yield from _with_settings(name, getattr(self._trainer, name, None))
        if self._loader is None:
            return
        yield from _with_settings("loader.dataset", self._loader.dataset.inner)
        yield from _with_settings("loader.collate_fn", self._loader.dataset.inner_collate)
        if self._loader.sampler is not None:
            yield from seeds_of_sampler(self._loader.sampler.inner, _SAMPLER)

    def epoch_begins(self, seen: Look) -> None:
        """The first step of an epoch is to come, and ``seen`` is what its batches find."""
        self._before = {path: mark for path, mark in seen.marks.items() if is_of_data(path)}

    def step_begins(self, known: Mapping[str, Place]) -> None:
        """A step is to come, during which the batches of the next one are made; ``known`` is what may change."""
        for path, place in known.items():
            if is_of_data(path) and not (self._has_workers or path.startswith(_SAMPLER)):
                self._before[path] = place.mark()

    def doubts(self, seen: Look) -> Iterator[str]:
        """The paths of what a save that is made now may not have as the next batch was made with."""
        for path, before in self._before.items():
            if path in seen.marks and not _is_kept(before, seen.marks[path]):
                yield path
        if not self.are_carried:
            now = look(self._roots(), self.generators)
            for path, mark in now.marks.items():
                is_told = self._lives_on or (type(mark) in PLAIN_SCALARS and not _is_set_with_epoch(now.places[path]))
                if is_told and not _is_kept(self._first.get(path), mark):
                    yield path


def _with_settings(name: str, one: Any) -> Iterator[Seed]:
    """An object, and what a user may set anew of a library's, as the share of tokens that a collator masks."""
    yield name, one, None
    if not issubclass(type(one), type) and is_of_library(type(one)):
        for key, value in attributes_of(one).items():
            if type(value) in PLAIN_SCALARS and not key.startswith("_"):
                yield f"{name}.{key}", value, Place(one, key, name)
    if library_of(type(one).__module__) == "datasets" and isinstance(getattr(one, "format", None), dict):
        yield f"{name}.transform", one.format["format_kwargs"].get("transform"), None


def is_of_data(path: str) -> bool:
    """Whether a path leads to what makes batches."""
    return path.partition(".")[0] in _OF_DATA


def _is_set_with_epoch(place: Place) -> bool:
    """Whether it is what ``set_epoch``, which a stream is told its epoch by in a resumed run too, sets."""
    return place.key in names_stored_in(getattr(type(place.holder), "set_epoch", None))


def _is_kept(before: Any, now: Any) -> bool:
    return bool(before == now) or has_only_grown(before, now)
