"""Which epoch and which batch training is at, and that a resumed run continues exactly there.

Trainer counts a resumed run's position from ``global_step`` alone. That is right for a loader with a length, where all
epochs have as many steps; for a stream it takes every pass for the first. Here the position is counted, saved, and put
in the place of Trainer's; where that cannot be, the two are compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.state import GradientState
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_structure
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import loader_in_loop, place_in_loop
from hf_lifecycle.hosts.trainer.method_patching import borrow, give_back

__all__ = ["Position", "epoch_ends_here", "position_from"]

# What an epoch's number of steps comes from, beside the data.
_EPOCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "dataloader_drop_last")


def position_from(trainer: Any, checkpoint: Path) -> Callable[[Any], Any] | None:
    """What puts the saved epoch and batch in the place of Trainer's; None where it has to count by itself."""
    file = rank_file(checkpoint, trainer.args.process_index)
    loader = loader_in_loop()
    if loader is None or not has_length(loader) or not file.is_file():
        return None
    try:
        saved = read_structure(file, kind=TRAINER)
    except StateFileError:  # which is said when it is read whole
        return None
    given, args = saved["arguments"], trainer.args
    if saved["environment"]["world_size"] != args.world_size or args.ignore_data_skip:
        return None
    if any(given[name] != getattr(args, name) for name in _EPOCH) or saved["data"]["examples"] != _rows(loader):
        return None  # its batches would be other ones
    place = _next_place(saved["parts"][Position.key])
    return lambda _: place


def _rows(loader: Any) -> int | None:
    dataset = getattr(loader, "dataset", None)
    return len(dataset) if has_length(dataset) else None


def _next_place(saved: Mapping[str, Any]) -> tuple[int, int]:
    """The epoch that a resumed run continues in, and how many of its batches have been trained on."""
    if saved["at_end"] or (saved["closed"] and not saved["stopped"]):
        return saved["epoch"] + 1, 0
    return saved["epoch"], saved["batches"]


def epoch_ends_here(state: TrainerState) -> bool:
    """Whether the last batch of this epoch, or of this pass over a stream, has been trained on."""
    loader = GradientState().active_dataloader
    return float(state.epoch).is_integer() or bool(getattr(loader, "end_of_dataloader", False))


class Position(Component):
    """The epoch, the batches of it that were trained on, and whether its end has been reached.

    Attributes:
        epoch: Index of the epoch, from 0; -1 before the first.
        batches: Batches (micro-batches, of this rank) trained on in this epoch.
        at_end: Whether no batch of this epoch is left to be trained on.
        closed: Whether this epoch's ``on_epoch_end`` has begun.
        stopped: Whether it began in the middle of the epoch, because training was to stop.
        in_first_epoch: Whether the epoch is the first since ``train()`` was called.
        resumes_at_batch: The batch of that first epoch at which it is entered.
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
        self.resumes_at_batch = 0
        self._steps = 0  # optimizer steps of this epoch
        self._given = 1  # gradient_accumulation_steps when training began
        self._accumulation = 1  # and at the last save

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "batches": self._batches_at_begin if self.mid_step else self.batches,
            "at_end": self.at_end and not self.mid_step,
            "closed": self.closed,
            "stopped": self.stopped,
            "steps": self._steps,
            "accumulation": None if self._accumulation == self._given else self._accumulation,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "epoch", "batches", "at_end", "closed", "stopped", "steps", "accumulation")
        self._saved = dict(state)

    def rescale(self, per_batch_saved: int, per_batch_now: int) -> str | None:
        """Count the saved position in batches of another size. Returns why that cannot be, or None."""
        assert self._saved is not None
        examples = self._saved["batches"] * per_batch_saved
        here, rest = divmod(examples, per_batch_now)
        if rest and not (self._saved["closed"] or self._saved["at_end"]):
            return (
                f"{examples} examples of the epoch are done, which is not a whole number of batches of the present size"
            )
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
    def skips_by_itself(self) -> bool:
        """Whether the loader of a resumed stream skips, rather than Trainer."""
        return self._stream is not None

    def skip(self, batches: int) -> None:
        """Let the loader of a resumed stream skip so many batches in its first pass; the position is not moved."""
        self._stream.skip_batches = batches

    def prepare(self, args: TrainingArguments, state: TrainerState, loader: Any) -> list[str]:
        """Set the position for a run that starts or resumes. Returns why Trainer would continue elsewhere, if so."""
        self._given = self._accumulation = args.gradient_accumulation_steps
        if state.global_step == 0:
            return []
        borrow(args, "eval_on_start", False)  # the start was long ago, and its row is in the log
        accumulation = args.gradient_accumulation_steps
        if has_length(loader):
            steps_per_epoch = max(-(-len(loader) // accumulation), 1)
            epoch, steps = divmod(state.global_step, steps_per_epoch)
            epoch, batches = place_in_loop(epoch, steps * accumulation)
        else:
            epoch, batches = 0, state.global_step * accumulation
        self.epoch, self.resumes_at_batch, self.resumed_inside = epoch - 1, batches, batches > 0
        if self._saved is None:  # a checkpoint of stock Trainer: its arithmetic is all there is
            return []
        if args.ignore_data_skip:
            return ["ignore_data_skip=True: the resumed run reads other batches than an uninterrupted one"]
        self.batches = self._saved["batches"]
        saved_epoch, saved_batches = _next_place(self._saved)
        if not has_length(loader):
            return self._take_over_stream(args, state, loader, saved_epoch, saved_batches)
        if (saved_epoch, saved_batches) != (epoch, batches):
            return [
                f"the checkpoint was saved in epoch {saved_epoch} after {saved_batches} batches, but Trainer "
                f"continues in epoch {epoch} after {batches}: epochs of different lengths (should_epoch_stop, a "
                "dataset that changed its length, or a changed gradient_accumulation_steps) cannot be resumed by "
                "step count"
            ]
        changed = self._saved["accumulation"]
        if changed is not None and saved_batches > 0 and self._saved["steps"] != saved_batches // changed:
            return [
                f"gradient_accumulation_steps was changed to {changed} in the middle of epoch {epoch}, and Trainer "
                "then miscounts the steps that are left in the epoch. Change it in on_epoch_begin or at an epoch's "
                "last step, or resume from a checkpoint of another epoch"
            ]
        return []

    def _take_over_stream(
        self, args: TrainingArguments, state: TrainerState, loader: Any, epoch: int, batches: int
    ) -> list[str]:
        if not hasattr(loader, "skip_batches"):
            if epoch == 0:
                return []
            return [
                (f"a {type(loader).__qualname__} without length, cannot be positioned in its pass number {epoch + 1}")
            ]
        # Trainer must not skip by its own count: the loader skips, within the pass that the run was in. Both are read
        # after on_train_begin, and both are put back when the first epoch has begun.
        borrow(args, "ignore_data_skip", True)
        loader.skip_batches = batches
        self._stream = loader
        self._batches_per_epoch = state.max_steps * args.gradient_accumulation_steps
        self.epoch, self.resumes_at_batch, self.resumed_inside = epoch - 1, batches, batches > 0
        return []

    def on_epoch_begin(self, event: Event) -> None:
        if self._reopens:
            self._reopens = self.closed = self.stopped = False
            return
        self.at_end = False
        self._epochs_begun += 1
        self.in_first_epoch = self._epochs_begun == 1
        self.epoch += 1
        self.batches = self.resumes_at_batch if self.in_first_epoch else 0
        self._steps = 0
        if self.in_first_epoch and self._saved is not None:
            self._steps = self._saved["steps"] if self.batches > 0 else 0
            if self._saved["accumulation"] is not None:  # Trainer reads it before the epoch's first batch
                event.args.gradient_accumulation_steps = self._accumulation = self._saved["accumulation"]
        self.closed = self.stopped = False
        if self._stream is not None and not self.in_first_epoch:
            self._stream.skip_batches = 0

    def on_step_begin(self, event: Event) -> None:
        self.release(event.args)
        self._step_begun, self._batches_at_begin = event.state.global_step, self.batches

    def on_substep_end(self, event: Event) -> None:
        self.batches += 1

    def on_step_end(self, event: Event) -> None:
        self._end_step(event.state)
        self.at_end |= event.control.should_epoch_stop
        if self._batches_per_epoch is not None:  # as Trainer would have counted it, had it not begun at 0 again
            event.state.epoch = self.epoch + self.batches / self._batches_per_epoch

    def _end_step(self, state: TrainerState) -> None:
        """Count the last batch of the step in progress, once."""
        if self._step_begun is not None:
            self._step_begun = None
            self.batches += 1
            self._steps += 1
            self.at_end = epoch_ends_here(state)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._accumulation = args.gradient_accumulation_steps
        if self._step_begun is not None and state.global_step > self._step_begun:
            self._end_step(state)  # a callback that hears of the step's end before us saves
        self.mid_step = self._step_begun is not None

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self.mid_step = False

    def on_epoch_end(self, event: Event) -> None:
        self.closed, self.stopped = True, event.control.should_training_stop and not self.at_end
        self._step_begun = None  # a stream may end within a step, which the next pass then completes

    def release(self, args: TrainingArguments) -> None:
        give_back(args, "ignore_data_skip", "eval_on_start")
