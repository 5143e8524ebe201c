"""Which epoch and which batch training is at, and that a resumed run goes on exactly there.

Trainer counts a resumed run's position from ``global_step`` alone. That is right for a loader with a length; for a
stream without one it takes every pass for the first. Here the position is counted, saved, compared with Trainer's
and, for streams, put in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.state import GradientState
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_lifecycle.trainer.loans import borrow, give_back
from hf_lifecycle.trainer.part import Part

__all__ = ["Position", "epoch_ends_here"]


def epoch_ends_here(state: TrainerState) -> bool:
    """Whether the last batch of this epoch, or of this pass over a stream, has been trained on."""
    loader = GradientState().active_dataloader
    return float(state.epoch).is_integer() or bool(getattr(loader, "end_of_dataloader", False))


class Position(Part):
    """The epoch, the batches of it that were trained on, and whether its end has been reached.

    Attributes:
        epoch: Index of the epoch, from 0; -1 before the first.
        batches: Batches (micro-batches, of this rank) trained on in this epoch.
        at_end: Whether no batch of this epoch is left to be trained on.
        closed: Whether this epoch's ``on_epoch_end`` has begun.
        stopped: Whether it began in the middle of the epoch, because training was to stop.
        in_first_epoch: Whether the epoch is the first since ``train()`` was called.
        resumed_inside: Whether that first epoch was entered in its middle.
        mid_step: Whether a save is being made in the middle of an optimizer step. What it has is what the step began
            with, and a resumed run takes the step from its begin.
    """

    key = "position"

    def __init__(self) -> None:
        self.epoch = -1
        self.batches = 0
        self.at_end = False
        self.closed = True
        self.stopped = False
        self.in_first_epoch = False
        self.resumed_inside = False
        self.mid_step = False
        self._step_begun: int | None = None  # the global step at which the step in progress began
        self._batches_at_begin = 0  # of that step
        self._saved: dict[str, Any] | None = None
        self._epochs_begun = 0
        self._reopens = False
        self._stream: Any = None  # the loader of a resumed stream
        self._batches_per_epoch: int | None = None
        self._first_batch = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batches": self._batches_at_begin if self.mid_step else self.batches,
            "at_end": self.at_end and not self.mid_step,
            "closed": self.closed,
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "epoch", "batches", "at_end", "closed", "stopped")
        self._saved = dict(state)

    def rescale(self, per_batch_saved: int, per_batch_now: int) -> str | None:
        """Count the saved position in batches of another size. Returns why that cannot be, or None."""
        assert self._saved is not None
        examples = self._saved["batches"] * per_batch_saved
        here, rest = divmod(examples, per_batch_now)
        if rest and not (self._saved["closed"] or self._saved["at_end"]):
            return f"{examples} examples of the epoch are done, which is no number of batches of now"
        self._saved["batches"] = here + bool(rest)
        return None

    @property
    def saved_after_epoch_end(self) -> bool:
        """Whether ``on_epoch_end`` had been raised before the checkpoint resumed from was saved."""
        return self._saved is not None and bool(self._saved["closed"])

    @property
    def epoch_end_is_due(self) -> bool:
        """Whether all batches of an epoch had been trained on then, and its ``on_epoch_end`` was still to come."""
        return self._saved is not None and bool(self._saved["at_end"] and not self._saved["closed"])

    def reopen(self) -> None:
        """The next ``on_epoch_begin`` is raised for the end of the epoch that was saved, which alone is due."""
        self._reopens = self.at_end = True

    @property
    def resumes_at_batch(self) -> int:
        """The batch, within its epoch, at which a resumed run goes on."""
        return self._first_batch

    @property
    def skips_by_itself(self) -> bool:
        """Whether the loader of a resumed stream skips, rather than Trainer."""
        return self._stream is not None

    def skip(self, batches: int) -> None:
        """Let the loader of a resumed stream skip so many batches in its first pass; the position is not moved."""
        self._stream.skip_batches = batches

    def prepare(self, args: TrainingArguments, state: TrainerState, loader: Any) -> list[str]:
        """Set the position for a run that begins or goes on. Returns why Trainer would go on elsewhere, if it would."""
        if state.global_step == 0:
            return []
        borrow(args, "eval_on_start", False)  # the start was long ago, and its row is in the log
        accumulation = args.gradient_accumulation_steps
        if has_length(loader):
            steps_per_epoch = max(-(-len(loader) // accumulation), 1)
            epoch, steps = divmod(state.global_step, steps_per_epoch)
            batches = steps * accumulation
        else:
            epoch, batches = 0, state.global_step * accumulation
        self.epoch, self._first_batch, self.resumed_inside = epoch - 1, batches, batches > 0
        if self._saved is None:  # a checkpoint of stock Trainer: its arithmetic is all there is
            return []
        if args.ignore_data_skip:
            return ["ignore_data_skip=True: the resumed run reads other batches than the unbroken one"]
        saved_epoch, saved_batches = self._saved["epoch"], self._saved["batches"]
        self.batches = saved_batches
        if self._saved["at_end"] or (self._saved["closed"] and not self._saved["stopped"]):
            saved_epoch, saved_batches = saved_epoch + 1, 0
        if not has_length(loader):
            return self._take_over_stream(args, state, loader, saved_epoch, saved_batches)
        if (saved_epoch, saved_batches) != (epoch, batches):
            return [
                f"the checkpoint was saved in epoch {saved_epoch} after {saved_batches} batches, but Trainer goes on "
                f"in epoch {epoch} after {batches}: epochs of different lengths (should_epoch_stop, or a dataset that "
                "changed its length) cannot be resumed by step count"
            ]
        return []

    def _take_over_stream(
        self, args: TrainingArguments, state: TrainerState, loader: Any, epoch: int, batches: int
    ) -> list[str]:
        if not hasattr(loader, "skip_batches"):
            if epoch == 0:
                return []
            return [f"a {type(loader).__qualname__} without length, in its pass number {epoch + 1}, cannot be skipped"]
        # Trainer must not skip by its own count: the loader skips, within the pass that the run was in. Both are read
        # after on_train_begin, and both are put back when the first epoch has begun.
        borrow(args, "ignore_data_skip", True)
        loader.skip_batches = batches
        self._stream = loader
        self._batches_per_epoch = state.max_steps * args.gradient_accumulation_steps
        self.epoch, self._first_batch, self.resumed_inside = epoch - 1, batches, batches > 0
        return []

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._reopens:
            self._reopens = self.closed = self.stopped = False
            return
        self.at_end = False
        self._epochs_begun += 1
        self.in_first_epoch = self._epochs_begun == 1
        self.epoch += 1
        self.batches = self._first_batch if self.in_first_epoch else 0
        self.closed = self.stopped = False
        if self._stream is not None and not self.in_first_epoch:
            self._stream.skip_batches = 0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.release(args)
        self._step_begun, self._batches_at_begin = state.global_step, self.batches

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.batches += 1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._end_step(state)
        self.at_end |= control.should_epoch_stop
        if self._batches_per_epoch is not None:  # as Trainer would have counted it, had it not begun at 0 again
            state.epoch = self.epoch + self.batches / self._batches_per_epoch

    def _end_step(self, state: TrainerState) -> None:
        """Count the last batch of the step in progress, once."""
        if self._step_begun is not None:
            self._step_begun = None
            self.batches += 1
            self.at_end = epoch_ends_here(state)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._step_begun is not None and state.global_step > self._step_begun:
            self._end_step(state)  # a callback that hears of the step's end before us saves
        self.mid_step = self._step_begun is not None

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self.mid_step = False

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.closed, self.stopped = True, control.should_training_stop and not self.at_end
        self._step_begun = None  # a stream may end within a step, which the next pass then completes

    def release(self, args: TrainingArguments) -> None:
        give_back(args, "ignore_data_skip", "eval_on_start")
