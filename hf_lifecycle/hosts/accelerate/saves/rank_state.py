"""What this rank adds to a checkpoint of a loop, and what the run is like beside its state.

Promise: the tree that :meth:`Carried.tree` gives has everything that accelerate's own files lack. What is the same on
all ranks is in rank 0's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_lifecycle.data.object_states import states_at_place
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.resume.run_fingerprint import capture_facts
from hf_lifecycle.hosts.accelerate.run_state.program import Program
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.objects import Stateful, left_to_rank_0, states_to_save
from hf_lifecycle.state.rng.states import RngState

__all__ = ["Carried", "SavedPart"]


class SavedPart(Protocol):
    """What has a state of its own in each save."""

    def state_dict(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class Carried:
    """This rank's part of the checkpoints of one run.

    Attributes:
        found: What is found beside what the accelerator prepared, by part.
        program: What the run was begun with.
        attempt: The name of this run of the program.
    """

    accelerator: Any
    ranks: Ranks
    loop: Loop
    best: BestMetric
    objects: Mapping[str, Stateful]
    found: Mapping[str, SavedPart]
    program: Program
    attempt: str
    _saves: int = 0

    def facts(self, plain_loaders: Mapping[str, Any]) -> dict[str, Any]:
        """Environment, settings and loaders of now, with the seed.

        Args:
            plain_loaders: Those that are looked at beside the prepared ones.
        """
        facts = capture_facts(self.accelerator, self.ranks.world_size, plain_loaders)
        facts["arguments"]["seed"] = self.loop.seed
        if self.loop.loaders.elastic:  # checkpoints of before do not name it
            facts["arguments"]["elastic"] = True
        if self.program.begun:  # nor this
            facts["program"] = self.program.begun
        return facts

    def state(self, weights: Callable[[], Any], *, epoch_is_over: bool) -> dict[str, Any]:
        """Everything that training may change, but for random numbers.

        Args:
            epoch_is_over: Whether a resumed run begins with the next epoch.
        """
        position = self.loop.state_dict(epoch_is_over=epoch_is_over)
        ahead: dict[str, Any] = {}  # of the user's objects, those that loaders hold
        for loader in position["loaders"].values():
            ahead |= states_at_place(loader["objects"])
        return {
            "position": position,
            "weights": weights(),
            "best": self.best.state_dict(),
            **{key: part.state_dict() for key, part in self.found.items()},
            "objects": states_to_save(self.objects, ahead),
        }

    def tree(self, state: Mapping[str, Any], rng: RngState) -> dict[str, Any]:
        """Everything that this rank adds. Objects that are alike on all ranks are left to rank 0, by an exchange.

        Args:
            state: What :meth:`state` has just given.
        """
        self._saves += 1
        parts = dict(state)
        objects = parts.pop("objects")
        shared = left_to_rank_0(objects, self.ranks) if objects else []  # all ranks have objects of the same names
        return {
            "identity": {"attempt": self.attempt, "step": self.loop.steps.count, "save": self._saves},
            **self.facts(self.program.plain_loaders.asked()),
            "parts": {**parts, "randomness": rng.state_dict()},
            "objects": {name: one for name, one in objects.items() if name not in shared},
            "shared": shared,
        }

    def objects_now(self, names: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The states of these of the user's objects."""
        return {name: dict(self.objects[name].state_dict()) for name in names}
