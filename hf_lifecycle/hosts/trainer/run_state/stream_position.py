"""A resumed stream continues at its place by the state of its dataset, and need not be read from its beginning.

Where the state cannot be relied on, Trainer's own way remains: the batches before the place are read and thrown away,
which is as exact, and one line says why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hf_lifecycle.checkpoint.files.tree import encode
from hf_lifecycle.data.loader import LoaderTakeover
from hf_lifecycle.errors import UnsafeStateError
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness

__all__ = ["StreamPlace"]

logger = logging.getLogger("hf_lifecycle")


class StreamPlace(Component):
    """Follows a stream batch by batch, and enters the place that was saved."""

    key = "stream"

    def __init__(self, position: Position, randomness: Randomness) -> None:
        self._position = position
        self._randomness = randomness
        self._saved: Mapping[str, Any] | None = None
        self._saved_obstacle = "the checkpoint has no position"
        self._enters = False

    @property
    def _loader(self) -> LoaderTakeover | None:
        return self._randomness.loader

    def state_dict(self) -> dict[str, Any]:
        loader = self._loader
        if loader is None or loader.position is None:
            return {"place": None, "obstacle": "" if loader is None else loader.no_position}
        place, obstacle = loader.position.place(), loader.position.obstacle()
        try:
            encode({"place": place})
        except (UnsafeStateError, ValueError) as error:  # what a dataset of the user's calls its state
            place, obstacle = None, str(error)
        return {"place": place, "obstacle": obstacle or ""}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "place", "obstacle")
        self._saved, self._saved_obstacle = state["place"], state["obstacle"]

    def prepare(self) -> None:
        """Let a stream that is resumed within a pass begin at its place."""
        if self._loader is None or not self._loader.iterable:
            return
        self._loader.follow()
        if not self._position.resumed_inside:
            return
        obstacle = self._obstacle(self._loader)
        if obstacle is not None:
            logger.info(
                "stream: %d batches are read again to reach the saved position: %s",
                self._position.resumes_at_batch,
                obstacle,
            )
            return
        assert self._saved is not None
        again = self._loader.enter(self._saved)
        self._position.skip(again)
        self._enters = True
        logger.debug(
            "stream: continues from the state of its dataset; %d batches are read again instead of %d",
            again,
            self._position.resumes_at_batch,
        )

    def _obstacle(self, loader: LoaderTakeover) -> str | None:
        """Why the saved place cannot be entered, or None."""
        if loader.position is None:
            return loader.no_position
        if self._saved is None:
            return self._saved_obstacle
        if not self._position.skips_by_itself:
            return "Trainer counts the batches of a stream that has a length"
        here = (self._position.epoch + 1, self._position.resumes_at_batch)
        if (self._saved["epoch"], self._saved["batches"]) != here:
            return f"the position is batch {self._saved['batches']} of epoch {self._saved['epoch'] + 1}"
        if self._saved["workers"] != loader.position.workers:
            return f"it was read by {self._saved['workers']} workers, and now by {loader.position.workers}"
        return None

    def on_epoch_begin(self, event: Event) -> None:
        if self._position.at_end:
            return
        if self._loader is not None and self._loader.position is not None and not self._enters:
            self._loader.position.begin(self._position.epoch)
        self._enters = False

    def _count(self, _: Event) -> None:
        if self._loader is not None and self._loader.position is not None:
            self._loader.position.trained()

    on_substep_end = on_step_end = _count
