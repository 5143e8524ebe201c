"""Plain values that a user's code keeps in attributes and changes while it trains are saved, and put back.

The step that a loss is annealed by, the best metric that a callback has seen, a dropout that is turned down, a layer
that was thawed: nothing of it has a ``state_dict``, and a resumed run would begin with it anew. What differs from what
it was when training began is part of every save. It is put back when the resumed epoch has begun, since callbacks hear
of that again, and before the first step begins. What was read from a clock is not: it means nothing in another process.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.messages import few
from hf_lifecycle.state.attributes import Look, Place, look
from hf_lifecycle.state.functions import names_stored_by
from hf_lifecycle.state.objects import Stateful
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import reachable
from hf_lifecycle.state.values import PLAIN_SCALARS, NotPlain, copied, given_back
from hf_lifecycle.trainer.host import present_trainer
from hf_lifecycle.trainer.outside import ELSEWHERE, user_callbacks
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.position import Position

__all__ = ["Attributes"]

logger = logging.getLogger("hf_lifecycle")

_LIBRARIES = ("transformers", "trl", "accelerate")  # whose trainers keep a state of their own, and not a user's
_CLOCKS = (time.time, time.monotonic, time.perf_counter, time.process_time)
_STEPS = 3  # after each of which everything is looked at, to know early what changes


class Attributes(Part):
    """Carries plain values of the trainer, its callbacks, its loss and its model, and which parameters are trained.

    Args:
        objects: What the user carries; it is left to that.
        position: Says whether a save falls within an optimizer step, which a resumed run takes from its begin.
    """

    key = "attributes"

    def __init__(self, objects: Mapping[str, Stateful], position: Position) -> None:
        self._given = objects
        self._position = position
        self._trainer: Any = None
        self._saved: Mapping[str, Any] | None = None
        self._first: dict[str, Any] | None = None  # the marks of all places before the first step
        self._first_of_data: dict[str, Any] = {}
        self._trained_first: dict[str, bool] = {}
        self._known: set[str] = set()  # that were changed in an earlier run, or at a save
        self._places: dict[str, Place] = {}  # of these, as they were last seen
        self._at_step: dict[str, Any] = {}  # of these what is small, as the step in progress found it
        self._told: set[str] = set()
        self._began: tuple[float, ...] = ()
        self._steps_looked_at = 0

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "values", "trained")
        self._saved = state

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer = present_trainer()
        self._began = tuple(clock() for clock in _CLOCKS)

    def state_dict(self) -> dict[str, Any]:
        if self._trainer is None or self._first is None:
            return {"values": {}, "trained": {}}
        seen = self._look()
        self._notice_changes(seen)
        self._tell_of_data()
        trained = self._trained()
        paths = sorted(self._known & seen.places.keys())
        return {
            "values": {path: one for path in paths for one in self._value(seen, path)},
            "trained": {name: flag for name, flag in trained.items() if self._trained_first.get(name, flag) != flag},
        }

    def _value(self, seen: Look, path: str) -> Iterator[dict[str, Any]]:
        """The value at ``path``, as it is saved; nothing where it cannot be."""
        place = seen.places[path]
        at_begin = self._at_step if self._position.mid_step else {}
        if self._position.mid_step and path not in at_begin:
            self._tell_once(path, f"{path} is saved as it is amid a step, which a resumed run takes from its begin")
        try:
            value = at_begin[path] if path in at_begin else copied(place.get())
        except NotPlain as why:
            self._tell_once(path, f"{path} changes while training runs, and a resumed run begins with it anew: {why}")
            return
        yield {"within": place.path, "key": place.key, "value": value}

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._trainer is None:
            return
        if self._saved is not None:
            self._put_back(self._saved)
            self._saved = None
        if self._first is None:
            self._first = self._look().marks()
            self._first_of_data = self._look_at_data().marks()
            self._trained_first |= {k: v for k, v in self._trained().items() if k not in self._trained_first}
        elif self._steps_looked_at < _STEPS:
            self._steps_looked_at += 1
            self._notice_changes(self._look())
        self._at_step = self._small_values()

    def _notice_changes(self, seen: Look) -> None:
        assert self._first is not None
        marks = seen.marks()
        changed = {path for path, mark in marks.items() if _is_changed(self._first, path, mark)}
        self._known |= {path for path in changed if not self._is_a_time(marks[path])}
        self._places = {path: seen.places[path] for path in self._known & seen.places.keys()}

    def _small_values(self) -> dict[str, Any]:
        """Copies of what is known to change, as a save in the middle of the step to come would need them."""
        values = {}
        for path, place in self._places.items():
            with contextlib.suppress(NotPlain, KeyError, IndexError, ValueError):
                values[path] = copied(place.get(), small=True)
        return values

    def _put_back(self, saved: Mapping[str, Any]) -> None:
        seen, lost = self._look(), []
        for path, one in saved["values"].items():
            place = seen.places.get(path) or seen.place(one["within"], one["key"])
            try:
                if place is None:
                    raise NotPlain("nothing is there now")
                place.put(given_back(_value_at(place), one["value"]))
                self._known.add(path)
            except (NotPlain, AttributeError, TypeError, ValueError, KeyError, IndexError):
                lost.append(path)
        parameters = dict(unwrapped(self._trainer.model).named_parameters())
        for name, flag in saved["trained"].items():
            if name in parameters:
                self._trained_first[name] = parameters[name].requires_grad
                parameters[name].requires_grad_(flag)
        if lost:
            logger.warning(
                "not exact: %d values that had changed while training ran are not where they were, so a resumed run "
                "begins with them anew: %s",
                len(lost),
                few(lost),
            )
        self._places = {path: seen.places[path] for path in self._known & seen.places.keys()}
        if self._known:
            logger.info("put back as they were at the save: %s", few(sorted(self._known)))

    def _trained(self) -> dict[str, bool]:
        return {name: one.requires_grad for name, one in unwrapped(self._trainer.model).named_parameters()}

    def _look(self) -> Look:
        return look(self._seeds(), [*self._given.values(), *reachable(dict(self._given)).values()])

    def _seeds(self) -> Iterator[tuple[str, Any, Place | None]]:
        trainer = self._trainer
        yield "model", unwrapped(trainer.model), None
        own = [kind for kind in type(trainer).__mro__ if kind.__module__.partition(".")[0] in _LIBRARIES]
        of_library = frozenset().union(*map(names_stored_by, own))
        for name, value in vars(trainer).items():
            if name not in ELSEWHERE:
                yield f"trainer.{name}", value, None if name in of_library else Place(trainer, name, "trainer")
        for kind in type(trainer).__mro__:
            yield kind.__name__, kind, None
        for name, callback in user_callbacks(trainer).items():
            yield name, callback, None

    def _look_at_data(self) -> Look:
        if self._trainer.args.dataloader_num_workers:  # the workers have copies of their own
            return Look({}, {}, {})
        seeds = [(name, getattr(self._trainer, name, None), None) for name in ("train_dataset", "data_collator")]
        return look(seeds, self._given.values())

    def _tell_of_data(self) -> None:
        """Batches are made ahead of training: what they depend on has to travel with them, which takes a state_dict."""
        for path, mark in self._look_at_data().marks().items():
            if type(mark) in PLAIN_SCALARS and _is_changed(self._first_of_data, path, mark):
                self._tell_once(
                    path,
                    f"{path} changes while training runs, and batches are made ahead of it: if they depend on it, give "
                    "its object state_dict() and load_state_dict()",
                )

    def _tell_once(self, path: str, sentence: str) -> None:
        if path not in self._told:
            self._told.add(path)
            logger.warning("not exact: %s", sentence)

    def _is_a_time(self, mark: Any) -> bool:
        """Whether a number was read from a clock since training began."""
        if type(mark) is not float:
            return False
        return any(began <= mark <= clock() for clock, began in zip(_CLOCKS, self._began, strict=True))

    def release(self, args: TrainingArguments) -> None:
        self._trainer = self._saved = self._first = None
        self._places = {}


def _is_changed(first: Mapping[str, Any], path: str, mark: Any) -> bool:
    if path not in first or type(first[path]) is not type(mark):
        return True
    before = first[path]
    return bool(before != mark and (before == before or mark == mark))  # NaN is itself


def _value_at(place: Place) -> Any:
    try:
        return place.get()
    except (KeyError, IndexError, ValueError):
        return None
