"""What the prepared loaders of a loop are made of, compared with what they were when the run began.

Promise: each loader is looked at once, before the loop that it is prepared for begins; a save looks at none. Loaders
that are prepared within an epoch may have other data in each, and are not compared.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from hf_lifecycle.data.made_of import made_of, other_parts, other_rows
from hf_lifecycle.hosts.accelerate.intercept import loaders_of

__all__ = ["TrainingData"]

logger = logging.getLogger("hf_lifecycle")


class TrainingData:
    """Follows the loaders of one run.

    Attributes:
        begun: What each was made of, by its name, as the run was begun.
    """

    def __init__(self, accelerator: Any) -> None:
        self.begun: dict[str, dict[str, Any]] = {}
        self._accelerator = accelerator
        self._present: dict[str, dict[str, Any]] = {}  # in this process
        self._saved: Mapping[str, dict[str, Any]] = {}  # of those that are not prepared yet

    def begin(self) -> None:
        """A loop is about to begin: look at the loaders that have been prepared for it."""
        problems, doubts = self._look()
        for problem in problems:
            logger.warning("not exact: %s", problem)
        for doubt in doubts:
            logger.warning("maybe not exact: %s", doubt)

    def loaded(self, saved: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[str]]:
        """A run that was begun with ``saved`` is continued; what is prepared later is compared then.

        Returns:
            A sentence for each thing that makes the resume inexact, and for each that may do so.
        """
        self._saved, self.begun = saved, {}
        return self._look()

    def _look(self) -> tuple[list[str], list[str]]:
        for number, loader in enumerate(loaders_of(self._accelerator)):
            if (name := f"loader {number}") not in self._present:
                self._present[name] = made_of(loader)
        new = {name: one for name, one in self._present.items() if name not in self.begun}
        known = {name: one for name, one in self._saved.items() if name in new}
        self.begun |= new | known
        return other_rows(known, new), other_parts(known, new)
