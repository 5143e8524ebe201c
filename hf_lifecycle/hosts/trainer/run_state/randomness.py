"""Training's random numbers: moved by training alone, and the same after a break.

The loader is put under streams of its own (:mod:`hf_lifecycle.data`), so that making batches moves nothing. What else
runs between two steps is taken out of the way: an evaluation or a prediction leaves the generators as it found them,
and from an epoch's end or a save to the next step they come out as they went in. The state is captured at the save and
put back at the first step after a resume, when all fetching is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate.state import GradientState
from transformers import TrainerState, TrainingArguments

from hf_lifecycle.data.loader import LoaderTakeover, obstacle, take_over
from hf_lifecycle.data.micro_batches import MicroBatches, share_out
from hf_lifecycle.data.streams import seed_all
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import before_method
from hf_lifecycle.hosts.trainer.intercept import EVALUATION_LOOP
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.state.rng.states import RngState, advance_host_rng, capture_rng, restore_rng

__all__ = ["Randomness"]


def _drop_first(batches: int) -> None:
    """Let the loader that accelerate iterates, which is one of its making, keep its first ``batches`` to itself."""
    loader: Any = GradientState().active_dataloader
    if loader is not None:
        loader.skip_batches = batches


class Randomness(Component):
    """Holds the generators and the loader.

    Args:
        elastic: Whether random numbers are those of the micro-batch, on whichever rank.
    """

    key = "randomness"

    def __init__(self, position: Position, *, elastic: bool = False) -> None:
        self.missing_sources: tuple[str, ...] = ()
        self.loader: LoaderTakeover | None = None
        self._position = position
        self._elastic = elastic
        self._micro_batches: MicroBatches | None = None
        self._saved: RngState | None = None
        self._held: RngState | None = None  # as it was before whatever runs between two steps
        self._leave_to_trainer = False  # a stock checkpoint: Trainer's own RNG file is the best there is
        self._put_back_at_step = False
        self._epoch_is_new = False
        self._before_save: RngState | None = None
        self._before_evaluations: list[RngState] = []  # as it was when those began that have not ended
        self._stop_watching: Callable[[], None] | None = None

    def state_dict(self) -> dict[str, Any]:
        return (capture_rng() if self._held is None else self._held).state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._saved, self.missing_sources = RngState.from_state_dict(state)

    def derive(self, args: TrainingArguments, state: TrainerState) -> None:
        """In place of what another rank saved: RNG states of (seed, step, rank)."""
        before = capture_rng()
        seed_all((args.seed, "rank", state.global_step, args.process_index))
        self._saved, self.missing_sources = capture_rng(), ()
        restore_rng(before)

    def prepare(self, args: TrainingArguments, state: TrainerState, loader: Any) -> list[str]:
        """Take over the loader. Returns why it cannot be, and what else of its randomness is out of reach."""
        self._leave_to_trainer = state.global_step > 0 and self._saved is None
        self._held = capture_rng() if self._saved is None else self._saved
        self._put_back_at_step = True
        self._stop_watching = before_method(EVALUATION_LOOP, lambda: self._before_evaluations.append(capture_rng()))
        if self._elastic:
            self._micro_batches = MicroBatches(args.seed, args.process_index, args.world_size)
        reason = obstacle(loader)
        if reason is not None:
            return [reason]
        seed = args.seed if args.data_seed is None else args.data_seed
        self.loader = take_over(loader, seed=seed, rank=args.process_index)
        if self._elastic and (reason := share_out(self.loader, args.world_size)) is not None:
            return [f"elastic=True: {reason}"]
        if self.loader.completes_from_first_batch:
            return [
                "dispatch_batches=True fills the last batch of an epoch with rows of its first, which an epoch that "
                "is resumed in the middle does not have; set dataloader_drop_last=True or dispatch_batches=False"
            ]
        return []

    def on_train_begin(self, event: Event) -> None:
        self._put_back()

    def on_epoch_begin(self, event: Event) -> None:
        self._put_back()
        self._put_back_at_step = True
        self._epoch_is_new = not (self._position.in_first_epoch and self._position.resumed_inside)
        if self.loader is not None and not self._position.at_end:
            inside = not (self._epoch_is_new or event.args.ignore_data_skip)
            done = self._position.resumes_at_batch if inside else 0
            self.loader.begin_epoch(self._position.epoch, skip=done, host=_drop_first)

    def on_step_begin(self, event: Event) -> None:
        if self._put_back_at_step:
            self._put_back()
            if self._epoch_is_new and not self._leave_to_trainer:
                # What others drew since the epoch began was restored. Without this step forward, a callback that draws
                # there would draw the same numbers in every epoch in which nothing else draws.
                advance_host_rng()
            self._put_back_at_step = self._epoch_is_new = self._leave_to_trainer = False
        self._begin_micro_batch()

    def on_substep_end(self, event: Event) -> None:
        self._begin_micro_batch()

    def _begin_micro_batch(self) -> None:
        if self._micro_batches is not None:
            self._micro_batches.begin(self._position.epoch, self._position.batches)

    def on_pre_optimizer_step(self, event: Event) -> None:
        if self._micro_batches is not None:
            self._micro_batches.begin_step(event.state.global_step)

    def on_step_end(self, event: Event) -> None:
        if not self._put_back_at_step:  # else it was saved already, and is what it was then
            self._held = capture_rng()
        self._before_evaluations.clear()  # of those that were interrupted

    def on_epoch_end(self, event: Event) -> None:
        if self._put_back_at_step:  # an epoch without a step
            self._put_back()
        self._held = capture_rng()

    def on_evaluate(self, event: Event) -> None:
        if self._before_evaluations and not self._leave_to_trainer:
            restore_rng(self._before_evaluations.pop())
        else:
            self._put_back()

    def on_predict(self, event: Event) -> None:
        self.on_evaluate(event)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._before_save = capture_rng()
        if not self._position.mid_step:
            # Invariant: what is saved is what the next step begins with, whatever is drawn in between. In the middle of
            # a step that is what this one began with, which is held.
            self._held = self._before_save
            self._put_back_at_step = True

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._before_save is not None:
            restore_rng(self._before_save)
            self._before_save = None

    def on_train_end(self, event: Event) -> None:
        if self._put_back_at_step:  # no step came
            self._put_back()

    def _put_back(self) -> None:
        if self._held is not None and not self._leave_to_trainer:
            restore_rng(self._held)

    def release(self, args: TrainingArguments) -> None:
        self._held = None
        self._before_evaluations.clear()
        if self._stop_watching is not None:
            self._stop_watching()
            self._stop_watching = None
        if self.loader is not None:
            self.loader.give_back()
            self.loader = None
