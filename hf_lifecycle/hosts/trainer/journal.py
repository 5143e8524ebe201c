"""The events of a run under Trainer that are not a save's: its begin and end, its resume, its stops."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.hosts.trainer.component import Component, Event

__all__ = ["Journal"]


class Journal(Component):
    """Tells the events of one call of ``train()``, which begins when this is made.

    Args:
        decision: Early stopping, whose settings are told when training begins, and its end of the run with its reason.

    Attributes:
        goes_on_later: Whether a signal ends training, which would not have ended.
    """

    key = "journal"

    def __init__(self, directory: RunDirectory, decision: EarlyStopping | None, monitor: str) -> None:
        self._directory = directory
        self._decision = decision
        self._monitor = monitor
        self._has_stopped = False
        self.goes_on_later = False
        self._made = time.monotonic()

    def begin(self, step: int, attempt: str, resumed_from: Path | None) -> None:
        """Tell that training begins; ``seconds`` is what restoring and proving took."""
        self._has_stopped = self._decision is not None and self._decision.should_stop
        event = "started" if step == 0 else "resumed"
        seconds = time.monotonic() - self._made
        self._directory.tell(event, step, seconds=seconds, path=resumed_from, attempt=attempt, **self._watched())

    def _watched(self) -> dict[str, Any]:
        """What early stopping was asked to do, so that it can be drawn later; a default goes without saying."""
        if self._decision is None:
            return {}
        settings, default = self._decision.settings, EarlyStopping().settings
        always = ("patience", "min_delta", "mode")
        told = {name: value for name, value in settings.items() if name in always or value != default[name]}
        return {"monitor": self._monitor, **told}

    def on_evaluate(self, event: Event) -> None:
        decision = self._decision
        if decision is not None and decision.should_stop and not self._has_stopped:
            self._has_stopped = True
            self._directory.tell("stopped", event.state.global_step, why=decision.reason)

    def on_train_end(self, event: Event) -> None:
        if not self.goes_on_later:
            self._directory.tell("ended", event.state.global_step, seconds=time.monotonic() - self._made)
