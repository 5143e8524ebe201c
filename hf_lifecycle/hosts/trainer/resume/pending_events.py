"""What was still due when a checkpoint was saved is done by the run that is resumed from it, before its first step.

Trainer saves where it is asked to: by steps at an epoch's last step too, whose ``on_epoch_end`` comes after that, with
a log row, an evaluation and another save; a callback may save before the step's own. Trainer forgets all of this. Here
it is done as its loop would have, in its order, without training: so a save moves nothing and adds no row to the log::

    on_train_begin ─ on_epoch_begin ─ [log] [evaluate] [save] of the step ─ on_epoch_end ─ [log] [evaluate] [save]
                     raised once more where the saved epoch has nothing but its end left, or the run had ended

A run that had ended, or ends by this, neither trains nor hears of another epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.hosts.trainer.after_event import after_other_callbacks
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import (
    amid_evaluation,
    left_of_step,
    log_evaluate_save,
    present_trainer,
    raise_event,
    stopped_by_transformers,
)
from hf_lifecycle.hosts.trainer.intercept import EPOCH
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, holding
from hf_lifecycle.hosts.trainer.run_state.attributes import Attributes
from hf_lifecycle.hosts.trainer.run_state.moment import SaveMoment
from hf_lifecycle.hosts.trainer.run_state.outside_model import user_callbacks
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.hosts.trainer.run_state.randomness import Randomness

__all__ = ["PendingEvents"]

logger = logging.getLogger("hf_lifecycle")


class PendingEvents(Component):
    """Does it.

    Args:
        randomness: Has the loader, which gives no more batches when the run ends.
        attributes: Puts back what callbacks keep, which may decide about what is due.
        moment: Tells whether ``on_save``, which comes next after a save, changes weights.
    """

    key = "due"

    def __init__(self, position: Position, randomness: Randomness, attributes: Attributes, moment: SaveMoment) -> None:
        self._position = position
        self._moment = moment
        self._randomness = randomness
        self._attributes = attributes
        self._control = TrainerControl()
        self._saved: Mapping[str, Any] | None = None
        self._had_ended = False
        self._quiet = MethodPatches()
        self._call_off: Callable[[], None] = lambda: None

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        if amid_evaluation():
            logger.warning(
                "not exact: step %d is saved in the middle of an evaluation, so a resumed run repeats that "
                "evaluation, or loses its best metric; set control.should_save there, and Trainer saves after the "
                "evaluation",
                state.global_step,
            )

    def state_dict(self) -> dict[str, Any]:
        comes_again = self._position.stopped or not self._position.closed
        trainer = present_trainer()  # a callback may have put another control in the place of the first
        control = self._control if trainer is None else trainer.control
        rows = 0 if trainer is None else len(trainer.state.log_history)
        left = left_of_step(control, epoch_end_comes_again=comes_again)
        return {**left, "rows": rows, "on_save": self._moment.on_save_changes_it}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved = {"rows": None, "on_save": False, **state}  # which earlier versions did not save
        self.check_keys(self._saved, "log", "evaluate", "save", "grad_norm", "learning_rate", "rows", "on_save")

    def prepare(self, args: TrainingArguments, state: TrainerState, *, stopped: bool) -> bool:
        """Return whether the run has no step left to train, also because our early stopping has ``stopped`` it."""
        if args.restore_callback_states_from_checkpoint:
            stopped |= stopped_by_transformers(present_trainer())
        self._had_ended = state.global_step > 0 and (stopped or state.global_step >= state.max_steps)
        return self._had_ended

    def on_train_begin(self, event: Event) -> None:
        self._control = event.control
        trainer = present_trainer()
        if trainer is None or self._saved is None:
            if self._had_ended:
                self._end(trainer, event.control)
            return
        self._call_off = after_other_callbacks(trainer, "on_train_begin", lambda: self._begin(trainer))

    def _begin(self, trainer: Any) -> None:
        position, saved = self._position, self._saved
        assert saved is not None
        inside = not (position.saved_after_epoch_end or position.epoch_end_is_due or self._had_ended)
        _forget_rows(trainer, saved)
        if inside:  # Trainer's loop is about to enter this epoch
            self._call_off = after_other_callbacks(trainer, "on_epoch_begin", lambda: self._enter(trainer, saved))
            return
        if position.epoch_end_is_due:
            position.reopen()
        if not position.saved_after_epoch_end:
            raise_event(trainer, "on_epoch_begin")
            _forget_rows(trainer, saved)
        self._finish(trainer, saved)

    def _enter(self, trainer: Any, saved: Mapping[str, Any]) -> None:
        """The epoch that was saved within has begun once more."""
        _forget_rows(trainer, saved)
        if saved["log"] or saved["evaluate"] or saved["save"] or saved["on_save"]:
            self._finish(trainer, saved)

    def _finish(self, trainer: Any, saved: Mapping[str, Any]) -> None:
        """Do what is left of the step and, where that comes next, of the epoch."""
        self._attributes.put_back()
        if saved["on_save"]:
            users = list(user_callbacks(trainer).values())
            with self._moment.repeats_on_save(), holding(trainer.callback_handler, "callbacks", users):
                raise_event(trainer, "on_save")
        control = trainer.control
        control.should_training_stop |= self._had_ended
        control.should_log, control.should_evaluate = saved["log"], saved["evaluate"]
        control.should_save = saved["save"]
        log_evaluate_save(trainer, self._position.epoch, saved)
        ends_epoch = self._position.epoch_end_is_due or trainer.control.should_training_stop
        if ends_epoch and not self._position.saved_after_epoch_end:
            raise_event(trainer, "on_epoch_end")
            log_evaluate_save(trainer, self._position.epoch, saved)
        if trainer.control.should_training_stop:
            self._end(trainer, trainer.control)

    def _end(self, trainer: Any, control: TrainerControl) -> None:
        """Let no batch come, and no event of an epoch be raised, until training ends."""
        control.should_training_stop = True
        control.should_log = control.should_evaluate = control.should_save = False
        if self._randomness.loader is not None:
            self._randomness.loader.close()
        if trainer is not None:
            for event in ("on_epoch_begin", "on_epoch_end"):
                self._quiet.replace(trainer.callback_handler, event, lambda _: lambda *given: given[-1])  # the control
            self._quiet.replace(trainer, EPOCH, lambda _: lambda **_: None)

    def release(self, args: TrainingArguments) -> None:
        self._call_off()
        self._call_off = lambda: None  # it holds the trainer's callbacks
        self._quiet.put_back()


def _forget_rows(trainer: Any, saved: Mapping[str, Any]) -> None:
    """Leave out the rows that callbacks have logged at an event which a resumed run hears once more."""
    if saved["rows"] is not None:
        del trainer.state.log_history[saved["rows"] :]
