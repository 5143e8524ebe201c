"""What a loop trains and no prepared model holds: found before training, saved with the rest, and proved like it.

A criterion whose weights an optimizer has, a teacher that hangs on a model without being one of its modules, an
optimizer that steps in a hook are in no file of accelerate's. Modules, optimizers and schedulers that are reached from
what the accelerator prepared are carried by the path on which they are found; parameters that only an optimizer holds,
by their place in it; a scheduler or an optimizer that was not prepared, by what it is attached to. What the user names
in ``objects=`` or registers for checkpointing is left to that. Of what DeepSpeed and Megatron-LM hold in their own
engines nothing is looked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from hf_lifecycle.hosts.accelerate.prepared import Prepared
from hf_lifecycle.hosts.accelerate.run_state.unreached import KeptGradients, Unreached
from hf_lifecycle.messages import few, shortened
from hf_lifecycle.saving.beside import Beside, changed_by_nobody, holds_any, place_of, sampled
from hf_lifecycle.state.alive import attached
from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.proof import parameters_in
from hf_lifecycle.state.reachable import attributes_of, is_stateful, kept_by, kept_by_optimizer, reachable

__all__ = ["Outside"]

logger = logging.getLogger("hf_lifecycle")


class Outside:
    """Carries what is trained outside the models of a loop.

    Args:
        place: Gives what differs from batch to batch.
        reached_from: Where is looked, for messages.
        way_on: What a user can do about a module that is not reached.
    """

    def __init__(
        self,
        prepared: Prepared,
        place: Callable[[], Any],
        *,
        reached_from: str = "what the accelerator prepared",
        way_on: str = 'pass it as objects={"name": it}, or make it part of a prepared model',
    ) -> None:
        self._prepared = prepared
        self._beside = Beside(reached_from=reached_from)
        self._looked_at: list[Any] | None = None  # what was prepared then
        self._has_saved = False
        self._is_complete = True  # the program stores nothing itself
        self._told: set[str] = set()
        self._unheld: dict[str, dict[str, str]] | None = None  # samples of what no optimizer holds, as the loop began
        self._unreached = Unreached(self._carried, place, way_on)
        self._gradients = KeptGradients(lambda: prepared.whole_models().values())

    @property
    def optimizers(self) -> list[Any]:
        """Those that step beside what the accelerator prepared."""
        return self._beside.optimizers

    def look_beside(self, stored: Iterable[torch.Tensor]) -> None:
        """The program stores these tensors itself: what changes and is not among them is named, at the next call."""
        self._is_complete = False
        self._unreached.begin()
        self._unreached.check(stored)

    def prepare(self) -> None:
        """Look for what is trained, in what has been prepared since; what no save can have is named."""
        prepared = self._prepared.all
        if self._looked_at is not None and list(map(id, prepared)) == list(map(id, self._looked_at)):
            return
        self._looked_at = prepared
        found = self._look()
        held, several = self._attached(found)
        held |= self._held_by_holders([*found.values(), *held.values()])
        self._beside.add(found, held, self._prepared.optimizers(), self._known())
        self._drop_what_cannot_be_carried()
        for name in several:
            self._tell_once(f"several {name} are not prepared, and none of them is saved: pass them as objects=")

    def _held_by_holders(self, found: list[Any]) -> dict[str, Any]:
        """What the program's own objects hold, but for what has a model's tensors in its state: it is a checkpoint."""
        every = self._prepared.holders().items()
        roots = {f"{name}.{key}": value for name, one in every for key, value in attributes_of(one).items()}
        held = reachable(roots, [*self._carried(), *self._prepared.data().values(), *every, *found])
        models = self._prepared.models().values()
        own = {place_of(one) for model in models for one in module_tensors(model).values()}
        return {name: one for name, one in held.items() if not (is_stateful(one) and holds_any(one, own))}

    def _attached(self, found: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """What was not prepared and is attached to what was."""
        names = self._prepared.names_of_optimizers()
        names |= {id(one): name for name, one in found.items() if isinstance(one, torch.optim.Optimizer)}
        return attached(self._prepared.models(), names, [*self._carried(), *found.values()])

    def begin(self) -> None:
        """Training begins."""
        if self._unheld is None:  # once more as the loop begins
            self._looked_at = None
            self._prepared.look_again()
        self.prepare()
        self._beside.watch()
        self._unreached.begin()
        if self._unheld is None:
            self._unheld = self._samples()

    def _samples(self) -> dict[str, dict[str, str]]:
        """Of the parameters that no optimizer holds, of models of which one holds some; others may be averages."""
        every = [*self._prepared.optimizers().values(), *self._beside.optimizers, *self._carried()]
        held = set(map(id, parameters_in(every)))
        models = self._prepared.whole_models().items()
        return {
            name: sampled(model, every) for name, model in models if any(id(one) in held for one in model.parameters())
        }

    def _drop_what_cannot_be_carried(self) -> None:
        for reason in shortened(self._beside.drop_what_cannot_be_carried()):
            self._tell_once(reason)

    def _tell_once(self, sentence: str) -> None:
        if sentence not in self._told:
            self._told.add(sentence)
            logger.warning("not exact: %s", sentence)

    def close(self) -> None:
        """Watch no more."""
        self._unreached.close()
        self._gradients.close()

    def state_dict(self) -> dict[str, Any]:
        self.prepare()
        self._gradients.saved()
        self._drop_what_cannot_be_carried()  # a state that was plain before the first step
        if (made := self._beside.made_late(self._look(), before="resume()")) is not None:
            self._tell_once(made)
        if not self._has_saved:
            self._has_saved = True
            before, now = self._unheld or {}, self._samples()
            for name in before:
                changed = changed_by_nobody(before[name], now.get(name, {}))
                if changed is not None:
                    self._tell_once(changed)
        if self._is_complete:
            self._unreached.check()
        self._beside.leave_to(optimizer.state_dict() for optimizer in self._prepared.optimizers().values())
        return self._beside.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]:
        """Give back what was saved. Returns what is not what was saved then."""
        self.prepare()
        absent = sorted(saved["attached"].keys() - self._beside.found.keys())
        if absent:
            verb = "was saved with the run, and is" if len(absent) == 1 else "were saved with the run, and are"
            self._tell_once(
                f"{few(absent)} {verb} not found at resume(), so the run continues with the initial "
                "state: create it before resume()"
            )
        return self._beside.load_state_dict(saved)

    def _carried(self) -> list[Any]:
        """What is saved, and what user's objects hold, which is theirs to save."""
        objects = self._prepared.objects()
        held = reachable({name: dict(attributes_of(one)) for name, one in objects.items()}).values()
        return [
            *self._known(),
            *held,
            *self._beside.found.values(),
            *self._beside.dropped,
            *self._beside.parameters.values(),
        ]

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
