"""A save falls where a log row ends and where the epoch's own work is done.

Trainer forgets, on resume, the loss since the last log row, and whatever an epoch's end would still have done after a
save at its last step. So a save is a log boundary, and a save that is due at an epoch's last step is made at the
epoch's end, after its log row and its evaluation. A run that had ended does nothing of this again.
"""

from __future__ import annotations

from typing import Any

from transformers import IntervalStrategy, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_lifecycle.trainer.loans import borrow, give_back
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.position import Position, epoch_ends_here

__all__ = ["Boundaries"]


class Boundaries(Part):
    """Moves the flags of ``TrainerControl``.

    Args:
        position: Tells whether the checkpoint was saved after its epoch's end.
        saves_at_evaluations: An evaluation may ask for a save (to restore the best weights at the end).
    """

    key = "boundaries"

    def __init__(self, position: Position, *, saves_at_evaluations: bool) -> None:
        self._position = position
        self._saves_at_evaluations = saves_at_evaluations
        self._postponed_save = False
        self._postponed_evaluation = False
        self._ended = False

    def prepare(self, args: TrainingArguments, state: TrainerState, *, ended: bool) -> None:
        """``ended``: the checkpoint is that of a run that has nothing left to train."""
        self._ended = ended
        if state.global_step > 0 and args.eval_on_start:  # the start was long ago, and its row is in the log
            borrow(args, "eval_on_start", False)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        may_save_after_evaluation = control.should_evaluate and (
            self._saves_at_evaluations or args.save_strategy == SaveStrategy.BEST
        )
        if not (control.should_save or may_save_after_evaluation):
            return
        self._ask_for_log(args, control)
        if epoch_ends_here(state):
            self._postponed_save, control.should_save = control.should_save, False
            if may_save_after_evaluation:
                self._postponed_evaluation, control.should_evaluate = True, False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._ended and self._position.saved_after_epoch_end():
            control.should_log = control.should_evaluate = control.should_save = False
        if self._ended:
            control.should_training_stop = True
        control.should_save |= self._postponed_save
        control.should_evaluate |= self._postponed_evaluation
        self._postponed_save = self._postponed_evaluation = False
        if control.should_save or control.should_evaluate:
            self._ask_for_log(args, control)

    def _ask_for_log(self, args: TrainingArguments, control: TrainerControl) -> None:
        if args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def release(self, args: TrainingArguments) -> None:
        give_back(args, "eval_on_start")
