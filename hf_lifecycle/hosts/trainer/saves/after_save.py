"""What other code changes after a save and before Trainer's step has ended, of what the save has, is named.

A callback's ``on_save``, and what a subclass does after ``super()._save_checkpoint()`` or after
``super()._maybe_log_save_evaluate()``, run when the checkpoint is complete: a resumed run begins with what was before
them. Weights are those of
:class:`~hf_lifecycle.hosts.trainer.run_state.moment.SaveMoment`. Nothing is looked at where no other code hears of the
save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.hosts.trainer.after_event import after_other_callbacks
from hf_lifecycle.hosts.trainer.callback_order import readers
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.intercept import END_OF_STEP, SAVE
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, overridden
from hf_lifecycle.hosts.trainer.run_state.adapter_merging import AdapterMerging
from hf_lifecycle.hosts.trainer.run_state.attributes import Attributes
from hf_lifecycle.messages import few
from hf_lifecycle.saving.snapshots.snapshot import version_of
from hf_lifecycle.state.modules import parameters_of
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.state.reachable import attributes_of
from hf_lifecycle.state.values.changes import is_changed
from hf_lifecycle.state.values.marks import Clocks, mark_of
from hf_lifecycle.state.values.trees import NotPlain

__all__ = ["AfterSave"]

logger = logging.getLogger("hf_lifecycle")


class AfterSave(Component):
    """Compares what was saved with what is there when all have heard of the save.

    Args:
        merging: Tells whether adapters are merged only for the save, which a resumed run undoes as well.
    """

    key = "after_save"

    def __init__(self, attributes: Attributes, merging: AdapterMerging) -> None:
        self._attributes = attributes
        self._merging = merging
        self._clocks = Clocks()
        self._told: set[str] = set()
        self._call_off: Callable[[], None] = lambda: None
        self._patches = MethodPatches()
        self._at_end_of_step: Callable[[], None] | None = None  # of the trainer's class

    def on_train_begin(self, event: Event) -> None:
        trainer = present_trainer()
        if trainer is not None and overridden(trainer, [END_OF_STEP]):
            self._at_end_of_step = lambda: None
            self._patches.replace(trainer, END_OF_STEP, self._followed)

    def _followed(self, own: Callable[..., Any]) -> Callable[..., Any]:
        def method(*given: Any, **named: Any) -> Any:
            result = own(*given, **named)
            if self._at_end_of_step is not None:
                self._at_end_of_step()
            self._at_end_of_step = lambda: None
            return result

        return method

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._call_off()
        trainer = present_trainer()
        others = [] if trainer is None else readers(trainer, self)
        if trainer is None or not (self._at_end_of_step is not None or others):
            return
        before, step = dict(self._marks(trainer)), state.global_step
        self._call_off = after_other_callbacks(trainer, "on_save", lambda: self._compare(trainer, before, step, others))
        if self._at_end_of_step is not None:
            last = f"{type(trainer).__name__}.{END_OF_STEP}"
            self._at_end_of_step = lambda: self._compare(trainer, before, step, [last])

    def _compare(self, trainer: Any, before: Mapping[str, Any], step: int, others: Sequence[str]) -> None:
        now = dict(self._marks(trainer))
        changed = [name for name in now if is_changed(before, name, now[name]) and not self._clocks.gave(now[name])]
        if self._merging.only_for_save:
            changed = [name for name in changed if not name.endswith(".merged_adapters")]
        news = sorted({name for name in changed if name not in self._told})
        if news:
            self._told.update(news)
            logger.warning(
                "not exact: %s changed %s after the save at step %d, so the checkpoint has the old values. Change "
                "them %s",
                *_who(others, few(news), step),
            )

    def _marks(self, trainer: Any) -> Iterator[tuple[str, Any]]:
        """What differs where something was changed, by a name for a message."""
        yield from self._attributes.marks().items()
        model, optimizer = unwrapped(trainer.model), trainer.optimizer
        yield from ((f"requires_grad of {name}", one.requires_grad) for name, one in parameters_of(model).items())
        yield from ((f"buffer {name}", version_of(one)) for name, one in model.named_buffers())
        for number, group in enumerate(getattr(optimizer, "param_groups", ())):
            settings = {key: value for key, value in group.items() if key != "params"}
            yield from _plain(settings, f"optimizer.param_groups[{number}]")
        states = getattr(getattr(optimizer, "optimizer", optimizer), "state", {})
        held: dict[str, list[Any]] = {key: [] for one in states.values() if isinstance(one, dict) for key in one}
        for one in states.values():
            for key, value in one.items() if isinstance(one, dict) else ():
                held[key].append(version_of(value) if hasattr(value, "data_ptr") else value)
        yield from ((f"{key} in the state of the optimizer", versions) for key, versions in held.items())
        scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
        if scheduler is not None:
            yield from _plain(dict(attributes_of(scheduler)), "lr_scheduler")

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        self._call_off()  # a save that no event followed

    def release(self, args: TrainingArguments) -> None:
        self._call_off()
        self._patches.put_back()
        self._at_end_of_step = None
        self._call_off = lambda: None  # it holds the trainer's callbacks


def _who(others: Sequence[str], news: str, step: int) -> tuple[str, str, int, str]:
    """Who may have changed ``news``, that and when, and where it is to be done."""
    places = {".on_save": "in on_step_end or on_step_begin"}
    places |= {f".{name}": f"before super().{name}()" for name in (SAVE, END_OF_STEP)}
    found = {end: [one for one in others if one.endswith(end)] for end in places}
    who = few([one for names in found.values() for one in names], " or ") or "your code"
    where = ", or ".join(places[end] for end, names in found.items() if names)
    return who, news, step, where or places[".on_save"]


def _plain(values: Mapping[str, Any], within: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        try:
            yield f"{within}.{key}", mark_of(value)
        except NotPlain:
            continue
