"""What is trained outside the model: found before training, saved with us, and proved like the rest.

A criterion with parameters, an optimizer in a hook, a reference model that follows the policy and what a trainer of TRL
has generated in advance are in no file of Trainer's. Modules, optimizers and schedulers that the trainer reaches, or
that methods of the user's name, are carried by the path of attributes on which they are found; parameters that only an
optimizer holds, by their place in it. A large module that never changes is not stored, only recognised. What the user
names in ``objects=`` is left to that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Set
from types import FunctionType
from typing import Any

import torch
from transformers import TrainingArguments

from hf_lifecycle.checkpoint.files.tree import encode
from hf_lifecycle.errors import UnsafeStateError
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.intercept import TRL_BUFFERS
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.saves.background import Background
from hf_lifecycle.hosts.trainer.saves.unresumable import adapters_trainer_cannot_load
from hf_lifecycle.libraries import module_of, root_of
from hf_lifecycle.messages import shortened
from hf_lifecycle.saving.beside import Beside, changed_by_nobody, sampled
from hf_lifecycle.saving.carrying import in_place_of, plain
from hf_lifecycle.saving.snapshots.live import host_copy, settled_copy
from hf_lifecycle.state.modules import one_of_each_kind, parameters_of
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import parameters_in, unwrapped
from hf_lifecycle.state.reachable import attributes_of, kept_by, kept_by_optimizer, reachable

__all__ = ["ELSEWHERE", "Outside", "user_callbacks"]

logger = logging.getLogger("hf_lifecycle")

# Of a trainer, what is no place for something trained: what Trainer saves, what makes batches, and what runs it.
ELSEWHERE = frozenset(
    {
        "accelerator",
        "args",
        "state",
        "control",
        "model",
        "model_wrapped",
        "optimizer",
        "lr_scheduler",
        "callback_handler",
        "processing_class",
        "train_dataset",
        "eval_dataset",
        "data_collator",
    }
)


class Outside(Component):
    """Carries what is trained and the model does not hold.

    Args:
        objects: What the user carries.
        background: Its copies are waited for before an optimizer in a hook steps.
        position: Says whether a save falls within an optimizer step, whose gradients a resumed run computes again.
    """

    key = "outside"

    def __init__(self, objects: Mapping[str, Stateful], background: Background, position: Position) -> None:
        self._position = position
        self._given = objects
        self._background = background
        self._trainer: Any = None
        self._beside = Beside()
        self._saved: Mapping[str, Any] | None = None
        self._has_saved = False
        self._reached: Set[str] = frozenset()
        self._is_looked_at = False  # what was reached by then
        self._unheld: dict[str, str] | None = None  # samples of what no optimizer holds, before the first step

    @property
    def optimizers(self) -> list[Any]:
        """Those that step beside Trainer's."""
        return self._beside.optimizers

    def parameters(self) -> Iterator[Any]:
        """Those of the model, and all that are carried beside it."""
        if self._trainer is not None:
            yield from parameters_of(unwrapped(self._trainer.model)).values()
            yield from parameters_in([self._trainer.optimizer, *self.optimizers])
        yield from self._beside.trained().values()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "carried", "attached", "samples", "parameters", "gradients", "buffers")
        self._saved = state

    def prepare(self) -> tuple[list[str], list[str]]:
        """Look for what is trained, and give back what was saved of it.

        Returns:
            What is not as it was in the run that saved, and what no save can have.
        """
        self._trainer = present_trainer()
        if self._trainer is None:
            return [], []
        found = self._look()
        self._beside = Beside()
        # The optimizer of DeepSpeed holds copies, which its engine saves.
        own = None if getattr(self._trainer, "is_deepspeed_enabled", False) else {"optimizer": self._trainer.optimizer}
        self._beside.add(found, {}, own, [unwrapped(self._trainer.model), *self._all_given()])
        # What only methods name, in variables of modules or of the function that makes their class, may be of another
        # training in this process.
        self._beside.add({}, self._look(found.values(), through_classes=True))
        problems = self._restore(self._saved) if self._saved is not None else []
        self._saved = None  # it may be as large as a model
        lost = self._beside.drop_what_cannot_be_carried()
        return problems, lost + adapters_trainer_cannot_load(self._trainer)

    def _look(self, known: Iterable[Any] = (), *, through_classes: bool = False) -> dict[str, Any]:
        trainer = self._trainer
        roots = {name: value for name, value in vars(trainer).items() if name not in ELSEWHERE}
        roots |= user_callbacks(trainer)
        roots |= kept_by(unwrapped(trainer.model), "model")
        for kind in reversed(type(trainer).__mro__):
            if _is_of_user(kind):
                roots |= {f"{kind.__name__}.{name}": value for name, value in vars(kind).items()}
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        inner = [getattr(optimizer, "optimizer", None), getattr(scheduler, "scheduler", None)]
        if not getattr(trainer, "is_deepspeed_enabled", False):
            roots |= kept_by_optimizer(inner[0] or optimizer, "optimizer")
        model = unwrapped(trainer.model)
        if through_classes:
            every = [*one_of_each_kind(model), inner[0] or optimizer]
            roots |= {type(one).__qualname__: type(one) for one in every}
        known = [trainer, model, trainer.args, optimizer, scheduler, *inner, *self._all_given(), *known]
        return reachable(roots, known, through_classes=through_classes)

    def _all_given(self) -> list[Any]:
        """What the user carries, and what that holds."""
        return [*self._given.values(), *reachable(dict(self._given)).values()]

    def state_dict(self) -> dict[str, Any]:
        dropped = self._beside.drop_what_cannot_be_carried()  # a state that was plain before the first step
        for reason in shortened(dropped):
            logger.warning("not exact: %s", reason)
        self._beside.leave_to(one.state_dict() for one in [getattr(self._trainer, "optimizer", None)] if one)
        return {
            **self._beside.state_dict(),
            "gradients": {} if self._position.mid_step else self._gradients(),
            "buffers": self._buffered(),
        }

    def _gradients(self) -> dict[str, torch.Tensor]:
        """What was left over: Trainer sets those of its model to zero, and no others."""
        return {name: host_copy(one.grad) for name, one in self._beside.trained().items() if one.grad is not None}

    def _buffered(self) -> dict[str, Any]:
        found = {name: plain(vars(self._trainer)[name]) for name in TRL_BUFFERS if name in vars(self._trainer or self)}
        try:
            encode(found)
        except (UnsafeStateError, ValueError) as error:
            if not self._has_saved:
                logger.warning(
                    "not exact: completions that the trainer generated in advance cannot be saved: %s", error
                )
            return {}
        kept: dict[str, Any] = settled_copy(found)
        return kept

    def _restore(self, saved: Mapping[str, Any]) -> list[str]:
        carried = {**saved["carried"], **saved["attached"]}
        problems = self._beside.load_state_dict({**saved, "carried": carried, "attached": {}})
        for name, live in self._beside.trained().items():
            if name in saved["gradients"]:
                live.grad = saved["gradients"][name].to(live.device)
        for name, value in saved["buffers"].items():
            own = vars(self._trainer).get(name)
            vars(self._trainer)[name] = in_place_of(own, value, self._trainer.args.device)
        return problems

    def on_train_begin(self, event: Event) -> None:
        self._background.wait_before(self.optimizers)
        self._unheld = self._held_by_nobody()
        self._beside.watch()

    def _held_by_nobody(self) -> dict[str, str]:
        if self._trainer is None or getattr(self._trainer, "is_deepspeed_enabled", False):
            return {}
        given = reachable(dict(self._given)).values()
        return sampled(unwrapped(self._trainer.model), [self._trainer.optimizer, *self.optimizers, *given])

    def on_step_end(self, event: Event) -> None:
        before, self._unheld = self._unheld, None
        changed = changed_by_nobody(before, self._held_by_nobody()) if before else None
        if changed is not None:
            logger.warning("not exact: %s", changed)

    def reached(self, paths: Set[str]) -> None:
        """All that a look for changed values has come to at this save: what is made later comes with another path."""
        self._is_looked_at &= paths == self._reached
        self._reached = paths

    def on_save(self, event: Event) -> None:
        if self._trainer is None:
            return
        self._has_saved = True
        if self._is_looked_at:  # which takes a fifth of the time that training is stopped for
            return
        self._is_looked_at = True
        made = self._beside.made_late(self._look(through_classes=True), before="train()")
        if made is not None:
            logger.warning("not exact: %s", made)

    def release(self, args: TrainingArguments) -> None:
        self._trainer, self._beside = None, Beside()


def user_callbacks(trainer: Any) -> dict[str, Any]:
    """The callbacks that hold what is trained, by their class, numbered where there are several of one."""
    callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", [])
    named: dict[str, Any] = {}
    for one in callbacks:
        if _is_of_user(type(one)) or any(type(held) is FunctionType for held in attributes_of(one).values()):
            name = type(one).__name__
            number = sum(type(other).__name__ == name for other in named.values())
            named[f"{name} {number + 1}" if number else name] = one
    return named


def _is_of_user(kind: type) -> bool:
    """Whether a class of trainer or callback is no library's, or TRL's, whose attributes hold what is trained."""
    return root_of(module_of(kind)) not in ("transformers", "builtins", "hf_lifecycle", "accelerate")
