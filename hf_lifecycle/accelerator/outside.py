"""What a loop trains and no prepared model holds: found before training, saved with the rest, and proved like it.

A criterion whose weights an optimizer has, a teacher that hangs on a model without being one of its modules, an
optimizer that steps in a hook are in no file of accelerate's. Modules, optimizers and schedulers that are reached from
what the accelerator prepared are carried by the path on which they are found; parameters that only an optimizer holds,
by their place in it. What the user names in ``objects=`` or registers for checkpointing is left to that. Of what
DeepSpeed and Megatron-LM hold in their own engines nothing is looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from hf_lifecycle.accelerator.trained import ENGINES, model_name, optimizer_name, scheduler_name
from hf_lifecycle.saving.beside import Beside, held_by_optimizers_alone
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import kept_by, kept_by_optimizer, reachable

__all__ = ["Outside"]

logger = logging.getLogger("hf_lifecycle")


class Outside:
    """Carries what is trained outside the models of a loop.

    Args:
        accelerator: Knows what it prepared.
        objects: What the user carries.
    """

    def __init__(self, accelerator: Any, objects: Mapping[str, Stateful]) -> None:
        self._accelerator = accelerator
        self._given = objects
        self._beside = Beside({}, {}, reached_from="what the accelerator prepared")
        self._looked_at: list[Any] | None = None  # what was prepared then
        self._has_saved = False

    @property
    def optimizers(self) -> list[Any]:
        """Those that step beside what the accelerator prepared."""
        return self._beside.optimizers

    def prepare(self) -> None:
        """Look for what is trained, in what has been prepared since; what no save can have is named."""
        prepared = [*self._accelerator._models, *self._accelerator._optimizers, *self._accelerator._schedulers]
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
        self._beside.leave_to(optimizer.state_dict() for _, optimizer in self._optimizers())
        return self._beside.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Give back what was saved. Returns what is not what was saved then."""
        self.prepare()
        return self._beside.load_state_dict(saved)

    def _models(self) -> Iterator[tuple[str, torch.nn.Module]]:
        if self._accelerator.distributed_type not in ENGINES:
            yield from ((model_name(number), unwrapped(one)) for number, one in enumerate(self._accelerator._models))

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        if self._accelerator.distributed_type not in ENGINES:
            every = enumerate(self._accelerator._optimizers)
            yield from ((optimizer_name(number), getattr(one, "optimizer", one)) for number, one in every)

    def _schedulers(self) -> Iterator[tuple[str, Any]]:
        every = enumerate(self._accelerator._schedulers)
        yield from ((scheduler_name(number), getattr(one, "scheduler", one)) for number, one in every)

    def _known(self) -> list[Any]:
        """What is carried already."""
        accelerator = self._accelerator
        within = [one for each in (self._models(), self._optimizers(), self._schedulers()) for _, one in each]
        registered = {str(number): one for number, one in enumerate(accelerator._custom_objects)}
        given = {**registered, **self._given}
        wrappers = [*accelerator._optimizers, *accelerator._schedulers]
        return [accelerator, *within, *wrappers, *given.values(), *reachable(given).values()]

    def _look(self) -> dict[str, Any]:
        roots: dict[str, Any] = {}
        for name, model in self._models():
            roots |= kept_by(model, name)
        for name, optimizer in self._optimizers():
            roots |= kept_by_optimizer(optimizer, name)
        roots |= {f"{name}.lr_lambdas": getattr(one, "lr_lambdas", None) for name, one in self._schedulers()}
        return reachable(roots, self._known())

    def _held_by_optimizers_alone(self, found: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        optimizers = {name: one for name, one in found.items() if isinstance(one, torch.optim.Optimizer)}
        return held_by_optimizers_alone(dict(self._optimizers()) | optimizers, [*self._known(), *found.values()])
