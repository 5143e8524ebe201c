"""Whether the weights of a save are those that training continues with, and of the moment that its position is of.

Promise: reported, or known to whoever writes the weights: an optimizer that has stepped already in the step in
progress; another model than the trained one; weights that others change between the save, or the resume, and the next
step. Where a callback's ``on_save`` changes them, as where an average is swapped for the save, a resumed run lets the
user's callbacks hear ``on_save`` once more: that comes next after a save, and the checkpoint has what it needs.

Not promised: that a step of an optimizer whose class does not call ``Optimizer.__init__`` is noticed, nor a write that
moves no version counter and misses every element looked at.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch

from hf_lifecycle.copies import Hook
from hf_lifecycle.hosts.trainer.after_event import after_other_callbacks, hears
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.libraries import module_of, root_of
from hf_lifecycle.saving.snapshots.live import stepping
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.sample import Known
from hf_lifecycle.saving.snapshots.snapshot import Watch, version_of
from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.gathering import is_dense
from hf_lifecycle.state.modules import parameters_of
from hf_lifecycle.state.proof import unwrapped

__all__ = ["SaveMoment"]

logger = logging.getLogger(__name__)


class SaveMoment:
    """The moment of each save of one training.

    Args:
        position: Tells whether a save is made in the middle of a step.

    Attributes:
        is_of_another_model: Whether the trainer's ``model`` was not the trained one at the last save, as where an
            average of the weights takes its place for the save.
        on_save_changes_it: Whether a callback's ``on_save`` changed weights after an earlier save.
    """

    def __init__(self, position: Position) -> None:
        self.is_of_another_model = self.on_save_changes_it = False
        self._position = position
        self._trainer: Callable[[], Any] = lambda: None
        self._model: torch.nn.Module | None = None
        self._has_stepped = False  # the optimizer, in the step in progress
        self._hook: Any = None
        self._unchanged: Callable[[], bool] | None = None  # since the last save or the resume, until the next step
        self._call_off: Callable[[], None] = lambda: None
        self._ends_epoch = False  # the last save: a resumed run hears what comes after its on_save as well
        self._has_said_so = False
        self._captured: tuple[Watch, Mapping[str, torch.Tensor]] | None = None  # of the save under way, and the rest
        self._frozen: Watch | None = None  # what the files of an adapter lack, as the constructor made it
        self._turn = 0
        self._views = Known()

    def prepare(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Training begins; ``model`` is the unwrapped one."""
        trainer, inner = present_trainer(), stepping(optimizer)
        self._model = model
        if getattr(model, "peft_config", None):
            kept, held = model.state_dict().keys(), module_tensors(model).items()
            frozen = ((name, one) for name, one in held if name in kept and not one.requires_grad)
            self._frozen = Watch(_plain(each for each in frozen if ".modules_to_save." not in each[0]), set())
        if trainer is not None:
            self._trainer = weakref.ref(trainer)
        if inner is not None:
            with suppress(AttributeError):  # a subclass that did not call Optimizer.__init__
                self._hook = inner.register_step_post_hook(Hook(self._after_optimizer_step))

    def _after_optimizer_step(self, *_: Any) -> None:
        self._has_stepped = True

    def resumed(self) -> None:
        """The weights are those of the checkpoint. Training begins: its ``on_train_begin`` is being raised."""
        self._watch()
        self._look_after("on_train_begin")

    def _look_after(self, event: str) -> None:
        trainer = self._trainer()
        if trainer is not None:
            self._call_off = after_other_callbacks(trainer, event, lambda: self._look_after_resume(event))

    def _look_after_resume(self, event: str) -> None:
        if self._unchanged is not None and not self._unchanged():
            self._unchanged, self._has_said_so = None, True
            logger.warning(
                "not exact: weights changed between the resume and the next step, in on_train_begin or "
                "on_epoch_begin of a callback, which run again at a resume; change them in on_step_begin"
            )
        elif event == "on_train_begin" and (self._position.resumed_inside or self._position.epoch_end_is_due):
            self._look_after("on_epoch_begin")  # of an epoch that had begun before the save
        else:
            self._unchanged = None

    def captured(self, watch: Watch, parameters: Mapping[str, torch.Tensor]) -> None:
        """A save is captured, and ``watch`` sees some of the model's ``parameters`` from that moment on."""
        self._captured = watch, {key: one for key, one in parameters.items() if not watch.sees(one)}

    def saved(self, *, is_undone: bool) -> None:
        """A save was made, captured, or failed; ``is_undone``: what was changed for it alone is changed back."""
        if not self._position.mid_step and not is_undone:
            self._watch()
            self._ends_epoch = self._position.at_end
            trainer = self._trainer()
            if trainer is not None and (self._ends_epoch or _others_hear_of_it(trainer)):
                is_repeated = self.on_save_changes_it  # by a resume from this checkpoint
                self._call_off = after_other_callbacks(trainer, "on_save", lambda: self._look_after_save(is_repeated))
        self._captured = None

    def _look_after_save(self, is_repeated: bool) -> None:
        unchanged, trainer = self._unchanged, self._trainer()
        if self._ends_epoch:
            self._unchanged = None
        if unchanged is None or trainer is None or unchanged():
            return
        self.on_save_changes_it = True
        if not self._ends_epoch:
            self._watch()
        if not is_repeated:
            logger.warning(
                "not exact: on_save of a callback changed weights after the save at step %d, so the checkpoint has "
                "the old ones; a resume from a later one calls on_save of your callbacks once more. To make this one "
                "exact too, change them in on_step_begin",
                trainer.state.global_step,
            )

    @contextmanager
    def repeats_on_save(self) -> Iterator[None]:
        """Within it, callbacks hear ``on_save`` of the save that is resumed from once more."""
        self.on_save_changes_it = True
        self._watch()
        unchanged, self._unchanged = self._unchanged, None
        yield
        if unchanged is not None and unchanged():
            logger.warning(
                "maybe not exact: on_save of your callbacks changed weights after earlier saves, but not when it was "
                "called once more for the save that is resumed from; if it needs something that is not in the "
                "checkpoint, pass that as LifecycleCallback(objects=...)"
            )

    def _watch(self) -> None:
        if self._has_said_so or self._model is None:
            return
        watches, rest = [], parameters_of(self._model) if self._captured is None else self._captured[1]
        if self._captured is not None:
            watches.append(self._captured[0])
        self._turn += 1
        watches.append(Watch(_plain(rest.items()), set(), self._turn, self._views))
        others = [(one, version_of(one)) for one in rest.values() if not _is_plain(one)]
        self._unchanged = lambda: (
            not any(watch.has_changed for watch in watches) and all(version_of(one) == seen for one, seen in others)
        )

    def moved(self) -> list[str]:
        """The frozen weights and buffers under an adapter that are others than the constructor made them."""
        return [] if self._frozen is None else self._frozen.changed()

    def begin_step(self, step: int) -> None:
        """A step begins after ``step`` others: no optimizer has stepped in it."""
        self._has_stepped = False
        unchanged, self._unchanged = self._unchanged, None
        self._call_off()  # a save that no event followed
        if self._ends_epoch:
            self._ends_epoch = False
        elif unchanged is not None and not unchanged():
            self._tell_changed(step)

    def _tell_changed(self, step: int) -> None:
        self._has_said_so = True
        logger.warning(
            "not exact: weights changed between the save at step %d and the next step, in an event of a callback, "
            "so the checkpoint has the old ones; change them in on_step_begin",
            step,
        )

    def look(self, step: int) -> None:
        """A save begins, after ``step`` steps."""
        saved = getattr(self._trainer(), "model", None)
        self.is_of_another_model = isinstance(saved, torch.nn.Module) and unwrapped(saved) is not self._model
        if self._position.mid_step and self._has_stepped:
            logger.warning(
                "not exact: saved after step %d, but the optimizer has already made the next step, which a resumed "
                "run makes again; save in on_step_end",
                step,
            )

    def close(self) -> None:
        """Training has ended."""
        self._unchanged = self._frozen = self._captured = None
        self._views.clear()
        self._call_off()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _others_hear_of_it(trainer: Any) -> bool:
    """Whether a callback beside this package's has an ``on_save``."""
    others = (one for one in trainer.callback_handler.callbacks if root_of(module_of(type(one))) != "hf_lifecycle")
    return any(hears(one, "on_save") for one in others)


def _plain(named: Iterable[tuple[str, torch.Tensor]]) -> list[LiveTensor]:
    return [LiveTensor(name, one, at_once=False) for name, one in named if _is_plain(one)]


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether its elements can be looked at as plain memory."""
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and is_dense(tensor) and not tensor.is_conj()
