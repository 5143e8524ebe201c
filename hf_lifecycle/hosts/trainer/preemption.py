"""A signal, or a time limit, ends training at the next step boundary, saved, so that it resumes exactly.

The step in progress is finished; an evaluation or a save in progress, or due at this step, is finished too. Then this
very step is saved, unless it is already, and training ends as Trainer ends it. What belongs to an epoch's end is done
only where the epoch ends here: a save in its middle adds no row to the log. ``load_best_model_at_end`` is left out, as
training is not over.

Where several processes train together, all of them end at the same step, whichever got the signal: each step's vote is
read at the next (:mod:`hf_lifecycle.processes.signal_consensus`).
"""

from __future__ import annotations

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_lifecycle.engine.failure_policy import FailurePolicy
from hf_lifecycle.engine.preemption import EndBySignal
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import training_frame
from hf_lifecycle.hosts.trainer.journal import Journal
from hf_lifecycle.hosts.trainer.method_patching import borrow
from hf_lifecycle.hosts.trainer.run_state.position import epoch_ends_here
from hf_lifecycle.hosts.trainer.saves.staging import Staging
from hf_lifecycle.hosts.trainer.stopping import Stopping
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["Preemption"]


class Preemption(Component):
    """Listens for signals during training, and ends it.

    Args:
        stopping: Tells whether early stopping ended the run, which then ends as it would have.
        staging: Has the save in flight.
        failures: Tells whether the last save failed; a step whose save did is saved once more.
    """

    key = "preemption"

    def __init__(
        self, end: EndBySignal, *, stopping: Stopping, staging: Staging, failures: FailurePolicy, journal: Journal
    ) -> None:
        self._end = end
        self._stopping = stopping
        self._staging = staging
        self._failures = failures
        self._journal = journal
        self._first_step = 0
        self._ends_by_itself = False
        self._active = False

    def on_train_begin(self, event: Event) -> None:
        self._first_step = event.state.global_step
        training = training_frame()
        if training is not None:  # else nothing tells that an exception has ended it
            self._end.listen(training)
            self._active = True

    def on_step_end(self, event: Event) -> None:
        at_epoch_end = epoch_ends_here(event.state)
        if at_epoch_end and _saves_by_metric(event):
            return
        self._heed(event, wait=False)
        # At an epoch's end the save waits for that end's own work, which the resumed run then need not do.
        if self._end.ended_by is not None and not self._ends_by_itself and not at_epoch_end:
            event.control.should_save = True

    def on_evaluate(self, event: Event) -> None:
        if _saves_by_metric(event) and epoch_ends_here(event.state):
            return
        self._heed(event)
        if self._end.ended_by is not None and self._active:
            event.control.should_save |= not self._is_saved(event.state)

    def on_save(self, event: Event) -> None:
        self._heed(event)

    def on_epoch_end(self, event: Event) -> None:
        if _saves_by_metric(event) and event.control.should_evaluate:
            return  # Trainer will decide about the save after the evaluation, against us: the next step is saved
        self._heed(event)
        if self._end.ended_by is None:
            return
        if self._is_in_mid_epoch(event):
            event.control.should_log = event.control.should_evaluate = event.control.should_save = False
        event.control.should_save |= not self._is_saved(event.state)
        self._do_not_load_best(event.args)

    def on_train_end(self, event: Event) -> None:
        self._first_step = -1  # where no step was left to be made, the signal is not lost either
        self._heed(event, ends=True)

    def _is_saved(self, state: TrainerState) -> bool:
        """Whether this step is on the disk; the same on every rank. A save of it that is in flight is waited for."""
        if self._staging.saved_step != state.global_step:
            return False
        self._staging.settle()
        failed: bool = Ranks.current().broadcast(
            self._failures.last_failed, what="checking whether the last save is complete"
        )
        return not failed

    def _do_not_load_best(self, args: TrainingArguments) -> None:
        if not self._ends_by_itself:
            borrow(args, "load_best_model_at_end", False)

    def _is_in_mid_epoch(self, event: Event) -> bool:
        ends = self._ends_by_itself or self._stopping.stopped or event.control.should_epoch_stop
        return not (ends or epoch_ends_here(event.state))

    def _heed(self, event: Event, *, wait: bool = True, ends: bool = False) -> None:
        """Let training end here if a signal has come, to whichever rank. Between steps the ranks can wait for that."""
        step = event.state.global_step
        if not self._active or step == self._first_step:
            return
        ends_by_itself = ends or event.control.should_training_stop
        if self._end.heed(step, wait=wait, ends=ends_by_itself):
            self._ends_by_itself = ends_by_itself
            event.control.should_training_stop = True
            self._do_not_load_best(event.args)
            self._journal.goes_on_later = not ends_by_itself

    def release(self, args: TrainingArguments) -> None:
        self._active = False
        self._end.stop_listening()


def _saves_by_metric(event: Event) -> bool:
    """Whether Trainer decides by an evaluation whether it saves, and training goes on."""
    return event.args.save_strategy == SaveStrategy.BEST and not event.control.should_training_stop
