"""Plain values that a user's code keeps in attributes and changes while it trains are saved, and restored.

The step that a loss is annealed by, the best metric that a callback has seen, a dropout that is turned down, a layer
that was thawed: nothing of it has a ``state_dict``, and a resumed run would begin with it anew. What differs from what
it was when training began is part of every save. It is put back when the resumed epoch has begun, since callbacks hear
of that again, and before the first step begins. What was read from a clock is not: it means nothing in another process.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from accelerate import PartialState
from transformers import TrainerState, TrainingArguments

from hf_lifecycle.bytecode import names_stored_by, names_stored_later_by
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import path_given_to_train, present_trainer
from hf_lifecycle.hosts.trainer.method_patching import as_given, is_lent
from hf_lifecycle.hosts.trainer.run_state.data_objects import DataValues, is_of_data
from hf_lifecycle.hosts.trainer.run_state.outside_model import ELSEWHERE, Outside, user_callbacks
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness
from hf_lifecycle.hosts.trainer.run_state.retries import Retries
from hf_lifecycle.libraries import put_into_libraries
from hf_lifecycle.messages import few
from hf_lifecycle.state.modules import one_of_each_kind, parameters_of
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import hooks_of, reachable
from hf_lifecycle.state.values.additions import (
    EarlierLooks,
    Seed,
    seeds_of_classes,
    seeds_of_libraries,
    seeds_of_optimizer,
    seeds_of_parameters,
    seeds_of_scheduler,
    seeds_put_on,
)
from hf_lifecycle.state.values.attributes import Look, look
from hf_lifecycle.state.values.changes import ChangedFlags, ChangedValues, begins_anew, made_ahead
from hf_lifecycle.state.values.functions import is_named_by_user
from hf_lifecycle.state.values.places import Place
from hf_lifecycle.state.values.trees import PLAIN_SCALARS
from hf_lifecycle.state.wiring import Wiring

__all__ = ["Attributes"]

logger = logging.getLogger("hf_lifecycle")

_LIBRARIES = ("transformers", "trl", "accelerate")  # whose trainers keep a state of their own, and not a user's
_STEPS = 3  # after each of which everything is looked at, to know early what changes


class Attributes(Component):
    """Carries plain values of the trainer, callbacks, loss, model and data, and which parameters are trained.

    Args:
        objects: What the user carries; it is left to that.
        position: Says whether a save falls within an optimizer step, which a resumed run takes from its begin.
        randomness: Has taken over the loader.
        outside: Carries what is trained beside the model.
        repeats: Knows what ended the trainings before.
    """

    key = "attributes"

    def __init__(
        self,
        objects: Mapping[str, Stateful],
        position: Position,
        randomness: Randomness,
        outside: Outside,
        repeats: Retries,
    ) -> None:
        self._given = objects
        self._outside = outside
        self._repeats = repeats
        self._is_again = False
        self._position = position
        self._randomness = randomness
        self._data: DataValues | None = None
        self._epoch = -1
        self._trainer: Any = None
        self._saved: Mapping[str, Any] | None = None
        self._values = ChangedValues(self._look, self._tell_once, is_of_data, self._parameter)
        self._trained = ChangedFlags("requires_grad", self._parameters)
        self._wiring = Wiring(lambda: {"model": unwrapped(self._trainer.model)})
        self._at_step: dict[str, Any] = {}  # what is known to change and is small, as the step in progress found it
        self._told: set[str] = set()
        self._environment: Mapping[str, str] = {}
        self._put_into_libraries: Mapping[str, Any] = {}
        self._steps_looked_at = 0
        self._earlier = EarlierLooks()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "values", "trained")
        self._saved = state

    def on_train_begin(self, event: Event) -> None:
        self._trainer = present_trainer()
        if self._trainer is None:
            return
        self._data = DataValues(self._trainer, self._randomness)
        self._put_into_libraries = put_into_libraries()
        self._values = ChangedValues(self._look, self._tell_once, is_of_data, self._parameter)
        self._values.take_first()
        self._trained.take_first()
        self._environment = dict(os.environ)
        self._is_again = self._repeats.begin(self._trainer, path_given_to_train() if event.state.global_step else None)

    def state_dict(self) -> dict[str, Any]:
        if self._data is None:
            return {"values": {}, "trained": {}}
        with self._earlier.once():
            seen, trained = self._values.notice(), self._trained.state_dict()
            wiring = self._wiring.changed()
        if wiring is not None:
            logger.warning("maybe not exact: %s", wiring)
        for name, _ in sorted(self._environment.items() ^ os.environ.items()):
            if is_named_by_user(name):
                self._tell_once(
                    name,
                    (
                        f"the environment variable {name} changes during training and is not saved: keep its value "
                        "in an attribute of a callback or of the trainer"
                    ),
                )
        self._outside.reached(seen.entered.keys() | seen.bindings.keys() | seen.holders.keys())
        doubts = sorted({*self._data.doubts(seen)} - self._told)
        if doubts:
            self._told.update(doubts)
            logger.warning("maybe not exact: %s", made_ahead(doubts))
        values = self._values.state_dict(self._at_step if self._position.mid_step else None, seen)
        for path in values if self._position.mid_step else ():
            if path not in self._at_step:
                self._tell_once(
                    path,
                    (
                        f"{path} is saved as it is in the middle of a step, and a resumed run repeats "
                        "that step from its start"
                    ),
                )
        return {"values": values, "trained": trained}

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._data is None:
            return
        self.put_back()
        self._wiring.take_first()
        is_new, self._epoch = self._position.epoch != self._epoch, self._position.epoch
        if is_new or self._steps_looked_at < _STEPS:
            self._steps_looked_at += 1
            seen = self._values.notice()
            if is_new:
                self._data.epoch_begins(seen)
        self._data.step_begins(self._values.places)
        self._at_step = self._values.small_copies()

    def put_back(self) -> None:
        """Put back what was saved, once: before the first step, or before what is done ahead of it."""
        saved, self._saved = self._saved, None
        if self._data is None or saved is None:
            return
        args = self._trainer.args
        # Version 0.2 took for the user's what had been lent at the begin.
        values = {path: one for path, one in saved["values"].items() if not is_lent(args, path.removeprefix("args."))}
        if self._is_again:
            values = self._without_process(values)
        lost = self._values.put_back(values)
        self._trained.load_state_dict(saved["trained"])
        if lost:
            logger.warning("not exact: %s", begins_anew(lost))
        if self._values.known:
            logger.debug("restored to their saved values: %s", few(sorted(self._values.known)))

    def _parameters(self) -> Mapping[str, Any]:
        return parameters_of(unwrapped(self._trainer.model))

    def _without_process(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values without those of callbacks and trainer that are others in this process, which are told."""
        owners = {"trainer", *user_callbacks(self._trainer)}
        left = [path for path in values if path.partition(".")[0] in owners]
        if left:
            logger.warning(
                "not exact: resumed a second time from the checkpoint after which your code raised an error; these "
                "values keep their present state instead of the saved one, since the error would repeat forever "
                "otherwise: %s",
                few(sorted(left)),
            )
        return {path: one for path, one in values.items() if path not in left}

    def marks(self) -> dict[str, Any]:
        """What differs where a value is another one, by its path."""
        if self._data is None:
            return {}
        seen = self._look()
        return {**seen.marks, **seen.bindings}

    def _parameter(self, path: str) -> Any:
        return self._parameters().get(path.removeprefix("model."))

    def _look(self) -> Look:
        seeded = [] if self._data is None else self._data.generators
        given = [*self._given.values(), *reachable(dict(self._given)).values()]
        return look(self._seeds(), [self._trainer, *seeded, *given], self._outside.parameters(), earlier=self._earlier)

    def _seeds(self) -> Iterator[Seed]:
        trainer = self._trainer
        if self._data is not None:
            yield from self._data.seeds()
        model = unwrapped(trainer.model)
        yield "model", model, None
        yield from ((key, hooks, None) for key, hooks in hooks_of(model, "model").items())
        yield from seeds_of_parameters(model, "model")
        yield from seeds_of_libraries(self._put_into_libraries)
        for called in ("control", "callback_handler", "accelerator"):
            yield from seeds_put_on(getattr(trainer, called), f"trainer.{called}")
        for called, one in _of_libraries(trainer).items():
            yield from seeds_put_on(one, called, named=True)
        yield from seeds_put_on(trainer.state, "state")
        optimizer, scheduler = trainer.optimizer, trainer.lr_scheduler
        inner, inner_scheduler = getattr(optimizer, "optimizer", optimizer), getattr(scheduler, "scheduler", scheduler)
        if optimizer is not None:
            yield from seeds_of_optimizer(inner, "optimizer")
            if inner is not optimizer:
                yield from seeds_put_on(optimizer, "prepared optimizer")
        if scheduler is not None:
            yield from seeds_of_scheduler(inner_scheduler, "lr_scheduler")
        for name, value in as_given(trainer.args).items():
            if type(value) in PLAIN_SCALARS:
                yield f"args.{name}", value, Place(trainer.args, name, "args")
        accumulation = getattr(getattr(trainer.accelerator, "gradient_state", None), "plugin_kwargs", {})
        if "num_steps" in accumulation:  # by which accelerate divides each loss
            yield "accelerator.num_steps", accumulation["num_steps"], Place(accumulation, "num_steps", "accelerator")
        own = [kind for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] in _LIBRARIES]
        of_library = frozenset().union(*map(_names_of, own))
        for name, value in vars(trainer).items():
            if name not in ELSEWHERE:
                yield f"trainer.{name}", value, None if name in of_library else Place(trainer, name, "trainer")
        wrapped = (trainer.accelerator, optimizer, inner, scheduler, inner_scheduler)
        yield from seeds_of_classes(trainer, *wrapped, *one_of_each_kind(model))
        for name, callback in user_callbacks(trainer).items():
            yield name, callback, None

    def _tell_once(self, path: str, sentence: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("not exact: %s", sentence)

    def release(self, args: TrainingArguments) -> None:
        self._repeats.release()
        self._trainer = self._saved = self._data = None
        self._values.release()
        self._earlier = EarlierLooks()
        self._put_into_libraries = {}
        self._wiring.release()


def _of_libraries(trainer: Any) -> dict[str, Any]:
    """Objects that libraries share, on which a user's code may keep something."""
    loader = trainer.callback_handler.train_dataloader
    callbacks = {f"callback {type(one).__name__}": one for one in trainer.callback_handler.callbacks}
    own = user_callbacks(trainer).values()
    return {
        "accelerator.state": trainer.accelerator.state,
        "accelerator.gradient_state": trainer.accelerator.gradient_state,
        "processes": PartialState(),
        "train_dataloader": loader,
        "train_dataloader.batch_sampler": getattr(loader, "batch_sampler", None),
        "processing_class": getattr(trainer, "processing_class", None),
        **{name: one for name, one in callbacks.items() if not any(one is each for each in own)},
    }


def _names_of(kind: type) -> frozenset[str]:
    """The attributes that a library's trainer changes. What Trainer sets as it is made, only a user's code changes."""
    if kind.__module__.startswith("transformers."):
        return names_stored_later_by(kind)
    return frozenset(name for name in names_stored_by(kind) if not is_named_by_user(name))
