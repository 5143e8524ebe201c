"""What a loop trains and no prepared model holds: found before training, saved with the rest, and proved like it.

A criterion whose weights an optimizer has, a teacher that hangs on a model without being one of its modules, an
optimizer that steps in a hook are in no file of accelerate's. Modules, optimizers and schedulers that are reached from
what the accelerator prepared are carried by the path on which they are found; parameters that only an optimizer holds,
by their place in it. What the user names in ``objects=`` or registers for checkpointing is left to that. Of what
DeepSpeed and Megatron-LM hold in their own engines nothing is looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from hf_lifecycle.accelerator.prepared import Prepared
from hf_lifecycle.saving.beside import Beside, held_by_optimizers_alone
from hf_lifecycle.state.reachable import kept_by, kept_by_optimizer, reachable

__all__ = ["Outside"]

logger = logging.getLogger("hf_lifecycle")


class Outside:
    """Carries what is trained outside the models of a loop.

    Args:
        prepared: What the accelerator prepared, and what the user carries.
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared = prepared
        self._beside = Beside({}, {}, reached_from="what the accelerator prepared")
        self._looked_at: list[Any] | None = None  # what was prepared then
        self._has_saved = False

    @property
    def optimizers(self) -> list[Any]:
        """Those that step beside what the accelerator prepared."""
        return self._beside.optimizers

    def prepare(self) -> None:
        """Look for what is trained, in what has been prepared since; what no save can have is named."""
        prepared = self._prepared.all
        if self._looked_at is not None and list(map(id, prepared)) == list(map(id, self._looked_at)):
            return
        self._looked_at = prepared
        found = self._look()
        self._beside.add(found, self._held_by_optimizers_alone(found))
        self._drop_what_cannot_be_carried()

    def begin(self) -> None:
        """Training begins."""
        self.prepare()
        self._beside.watch()

    def _drop_what_cannot_be_carried(self) -> None:
        for reason in self._beside.drop_what_cannot_be_carried():
            logger.warning("not exact: %s", reason)

    def state_dict(self) -> dict[str, Any]:
        self.prepare()
        self._drop_what_cannot_be_carried()  # a state that was plain before the first step
        if not self._has_saved:
            self._has_saved = True
            for name in self._beside.unknown_among(self._look()):
                logger.warning(
                    "not exact: %s was made during training, so a resumed run could not be given its state: make it "
                    "before resume(), or pass it as objects=",
                    name,
                )
        self._beside.leave_to(optimizer.state_dict() for optimizer in self._prepared.optimizers().values())
        return self._beside.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Give back what was saved. Returns what is not what was saved then."""
        self.prepare()
        return self._beside.load_state_dict(saved)

    def _known(self) -> list[Any]:
        """What is carried already."""
        return [*self._prepared.known(), *reachable(self._prepared.objects()).values()]

    def _look(self) -> dict[str, Any]:
        roots: dict[str, Any] = {}
        for name, model in self._prepared.models().items():
            roots |= kept_by(model, name)
        for name, optimizer in self._prepared.optimizers().items():
            roots |= kept_by_optimizer(optimizer, name)
        schedulers = self._prepared.schedulers().items()
        roots |= {f"{name}.lr_lambdas": getattr(one, "lr_lambdas", None) for name, one in schedulers}
        return reachable(roots, self._known())

    def _held_by_optimizers_alone(self, found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        optimizers = {name: one for name, one in found.items() if isinstance(one, torch.optim.Optimizer)}
        return held_by_optimizers_alone(self._prepared.optimizers() | optimizers, [*self._known(), *found.values()])
