"""Objects that take part in making batches are saved as they were when the last batch that was trained on was made.

A dataset, a collator or a sampler with a state is ahead of training, by the batches that were fetched ahead. What is
noted with each batch, and how it is given back, is :mod:`hf_lifecycle.data.object_states`; here is when.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hf_lifecycle.checkpoint.files.tree import reason_to_leave_out
from hf_lifecycle.data.object_states import ObjectStates, states_at_place
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness
from hf_lifecycle.state.objects import Stateful

__all__ = ["DataState"]

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
