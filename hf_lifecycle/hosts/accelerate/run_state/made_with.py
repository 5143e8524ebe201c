"""What the optimizers and schedulers of a loop are made with, compared with what they were when the run began.

Promise: a setting that is changed between two starts is told, whether loading undoes the change or not. Looked at is
what has made no step yet, in ``resume()`` or as a checkpoint is loaded. Not seen: what engines hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hf_lifecycle.engine.made_with import in_effect, settings_of, settings_of_schedule, unlike_settings
from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.state.alive import attached
from hf_lifecycle.state.environment import Difference

__all__ = ["MadeWith"]


class MadeWith:
    """Follows what one run was begun with.

    Attributes:
        begun: The settings of each, by name, as the run was begun; None where that is not known.
    """

    def __init__(self, prepared: Prepared) -> None:
        self.begun: dict[str, Any] | None = None
        self._prepared = prepared
        self._present: dict[str, Any] | None = None  # before a checkpoint is loaded

    def begin(self) -> None:
        """The run begins anew."""
        if self.begun is None and self._are_new():
            self.begun = self._now()

    def before_loading(self) -> None:
        """A checkpoint is about to be loaded."""
        self._present = self._now() if self.begun is None and self._are_new() else None

    def loaded(self, saved: Mapping[str, Any] | None) -> tuple[list[Difference], list[str]]:
        """It has been loaded. Returns what that has undone, and a sentence for each of the others."""
        present, self._present = self._present, None
        if self.begun is None and saved is not None:
            self.begun = {name: in_effect(one, (present or {}).get(name, {})) for name, one in saved.items()}
        if present is None or saved is None:
            return [], []
        now, undone, other = self._now(), [], []
        for name in (one for one in saved if one in present):
            found = unlike_settings(saved[name], present[name], now.get(name, {}), name)
            undone += found[0]
            other += found[1]
        return undone, other

    def _are_new(self) -> bool:
        return not any(getattr(one, "state", None) for one in self._prepared.optimizers().values())

    def _now(self) -> dict[str, Any]:
        optimizers = self._prepared.optimizers()
        beside, _ = attached({}, self._prepared.names_of_optimizers(), self._prepared.known())
        return {name: settings_of(one.param_groups) for name, one in optimizers.items()} | {
            name: settings_of_schedule(one) for name, one in (self._prepared.schedulers() | beside).items()
        }
