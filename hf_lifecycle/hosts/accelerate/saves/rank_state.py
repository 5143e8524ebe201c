"""What this rank adds to a checkpoint of a loop, and what the run is like beside its state.

Promise: the tree that :meth:`Carried.tree` gives has everything that accelerate's own files lack. What is the same on
all ranks is in rank 0's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from hf_lifecycle.data.object_states import states_at_place
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.resume.run_fingerprint import capture_facts
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.fingerprint import tree_digest
from hf_lifecycle.state.objects import Stateful, left_to_rank_0, states_to_save
from hf_lifecycle.state.rng.states import RngState

__all__ = ["Carried", "SavedPart"]


class SavedPart(Protocol):
    """What has a state of its own in each save."""

    def state_dict(self) -> dict[str, Any]: ...


class Carried:
    """This rank's part of the checkpoints of one run.

    Args:
        accelerator: The loop's accelerator.
        ranks: The processes of the training.
        loop: Knows where training is.
        best: The best metric.
        objects: The user's objects by name.
        found: What is found beside what the accelerator prepared, by part.
        attempt: The name of this run of the program.

    Attributes:
        attempt: As given.
    """

    def __init__(
        self,
        accelerator: Any,
        ranks: Ranks,
        loop: Loop,
        best: BestMetric,
        objects: Mapping[str, Stateful],
        found: Mapping[str, SavedPart],
        attempt: str,
    ) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self._loop = loop
        self._best = best
        self._objects = objects
        self._found = found
        self.attempt = attempt
        self._saves = 0
        self._at_epoch_end: dict[str, str] | None = None  # the objects' digests at a save at the epoch's end

    def facts(self) -> dict[str, Any]:
        """Environment, settings and loaders of now, with the seed."""
        facts = capture_facts(self._accelerator, self._ranks.world_size)
        facts["arguments"]["seed"] = self._loop.seed
        return facts

    def tree(self, rng: RngState, weights: Callable[[], Any], *, epoch_is_over: bool) -> dict[str, Any]:
        """Everything that this rank adds. On every rank: there are exchanges in it.

        Args:
            rng: The generators.
            weights: Gives the part of what is trained.
            epoch_is_over: Whether a resumed run begins with the next epoch.
        """
        self._saves += 1
        position = self._loop.state_dict(epoch_is_over=epoch_is_over)
        tree = {
            "identity": {"attempt": self.attempt, "step": self._loop.progress.step, "save": self._saves},
            **self.facts(),
            "parts": {
                "position": position,
                "randomness": rng.state_dict(),
                "weights": weights(),
                "best": self._best.state_dict(),
                **{key: part.state_dict() for key, part in self._found.items()},
            },
            **self._objects_to_save(position["loaders"]),
        }
        if epoch_is_over:
            self._at_epoch_end = self._object_digests()
        return tree

    @contextmanager
    def trying_to_save(self) -> Iterator[None]:
        """Around a save. From one that comes to nothing no run is resumed that could lack what changes later."""
        before = self._at_epoch_end
        try:
            yield
        except BaseException:
            self._at_epoch_end = before
            raise

    def _objects_to_save(self, loaders: Mapping[str, Any]) -> dict[str, Any]:
        """What is the same on all ranks is written by rank 0 alone. Those that loaders hold are ahead of training."""
        ahead: dict[str, Any] = {}
        for loader in loaders.values():
            ahead |= states_at_place(loader["objects"])
        states = states_to_save(self._objects, ahead)
        shared = left_to_rank_0(states, self._ranks)
        return {"objects": {name: state for name, state in states.items() if name not in shared}, "shared": shared}

    def _object_digests(self) -> dict[str, str]:
        clock = "elapsed_seconds"  # of early stopping, which goes on: that is no change
        states = {name: item.state_dict() for name, item in self._objects.items()}
        return {name: tree_digest({key: one[key] for key in one if key != clock}) for name, one in states.items()}

    def changed_since_epoch_end(self) -> list[str]:
        """The objects that changed since a save at the epoch's end; asked once, when the epoch's body is done."""
        saved, self._at_epoch_end = self._at_epoch_end, None
        if saved is None:
            return []
        now = self._object_digests()
        return [name for name in now if saved.get(name) != now[name]]

    def forget_epoch_end(self) -> None:
        """A checkpoint was loaded: what was saved before says nothing."""
        self._at_epoch_end = None
