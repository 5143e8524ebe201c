"""Every kind of loop that must be exact."""

from __future__ import annotations

from typing import Any

from hf_lifecycle import EarlyStopping

from . import data, programs
from .harness import LoopCase
from .programs import plain

__all__ = ["CASES"]


def _case(name: str, about: str, program: Any = plain, **more: Any) -> LoopCase:
    fields = {"accelerator", "objects", "break_at", "core", "needs", "resumed_options"}
    chosen = {key: more.pop(key) for key in fields & more.keys()}
    return LoopCase(name, about, program, options=more, **chosen)


def _accelerate(**settings: Any) -> Any:
    def make() -> dict[str, Any]:
        from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin

        made = dict(settings)
        if "loader" in made:
            made["dataloader_config"] = DataLoaderConfiguration(**made.pop("loader"))
        if "accumulation" in made:
            made["gradient_accumulation_plugin"] = GradientAccumulationPlugin(**made.pop("accumulation"))
        return made

    return make


def _stopping(patience: int) -> Any:
    return lambda: {"stopping": EarlyStopping(patience=patience)}


CASES = (
    _case("plain", "shuffled rows, saved every 4 steps", core=True),
    _case("plain_2", "the same with 2 data workers", workers=2),
    _case("first_epoch", "interrupted in the first epoch", break_at=(5,)),
    _case("three_breaks", "interrupted three times", break_at=(5, 3, 4), every=2),
    _case("last_batch", "saved after the last batch of an epoch", every=6, break_at=(7,)),
    _case("epoch_end", "saved at the end of each epoch, after an evaluation", every=0, at_epoch_end=True, core=True),
    _case("both_saves", "saved within epochs and at their ends", at_epoch_end=True, break_at=(14,)),
    _case("evaluating", "an evaluation with dropout every 3 steps, and a save every 4", evaluate_every=3),
    _case("in_order", "rows in order", loader=data.in_order),
    _case("generator", "shuffled by the loader's own generator", loader=data.own_generator),
    _case("seedable", "use_seedable_sampler=True", accelerator=_accelerate(loader={"use_seedable_sampler": True})),
    _case("weighted", "WeightedRandomSampler", loader=data.weighted),
    _case("roaming", "a sampler that draws at each index", loader=data.roaming),
    _case("batch_sampler", "a custom batch sampler", loader=data.own_batches),
    _case("drop_last", "drop_last, and rows that do not divide", loader=data.drop_last),
    _case("ragged", "a last batch that is smaller", loader=data.ragged),
    _case(
        "stateful",
        "use_stateful_dataloader=True",
        accelerator=_accelerate(loader={"use_stateful_dataloader": True}),
        loader=data.augmented,
        needs=("torchdata",),
    ),
    _case(
        "stateful_2",
        "the same with 2 data workers",
        accelerator=_accelerate(loader={"use_stateful_dataloader": True}),
        loader=data.augmented,
        workers=2,
        needs=("torchdata",),
    ),
    _case("dispatched", "dispatch_batches=True", accelerator=_accelerate(loader={"dispatch_batches": True})),
    _case(
        "dispatched_stream",
        "the same of a stream that draws",
        accelerator=_accelerate(loader={"dispatch_batches": True}),
        loader=data.stream,
    ),
    _case("split", "split_batches=True", accelerator=_accelerate(loader={"split_batches": True})),
    _case("augment_0", "augmentation by all three global generators", loader=data.augmented, core=True),
    _case("augment_2", "the same with 2 data workers", loader=data.augmented, workers=2, core=True),
    _case("workers_0_to_2", "the same, resumed with 2 workers", loader=data.augmented, resumed_options={"workers": 2}),
    _case("persistent", "the same, with persistent workers", loader=data.persistent, workers=2),
    _case("collator", "a collator that draws", loader=data.random_collator),
    _case("collator_2", "the same with 2 data workers", loader=data.random_collator, workers=2),
    _case("owned", "a dataset with its own generators", loader=data.owns_generators, workers=2),
    _case("stream_0", "a stream that draws, without length", loader=data.stream, core=True),
    _case("stream_2", "the same with 2 data workers", loader=data.stream, workers=2),
    _case("foreign", "no torch loader: a list of batches, shuffled by Python at each pass", loader=data.foreign),
    _case("unprepared", "a loader that the accelerator has not prepared", programs.unprepared),
    _case(
        "accumulation",
        "gradients accumulated over 2 batches",
        accelerator=_accelerate(gradient_accumulation_steps=2),
        every=2,
        core=True,
    ),
    _case(
        "accumulation_odd",
        "the same over 4, which does not divide the epoch",
        accelerator=_accelerate(gradient_accumulation_steps=4),
        every=1,
    ),
    _case(
        "accumulation_on",
        "the same, continuing over the end of the epoch",
        accelerator=_accelerate(accumulation={"num_steps": 4, "sync_with_dataloader": False}),
        every=1,
    ),
    _case("by_hand", "gradients accumulated by hand", programs.by_hand),
    _case("bf16", "mixed_precision='bf16'", accelerator=_accelerate(mixed_precision="bf16")),
    _case("pure_bf16", "bf16 weights with fp32 state of the optimizer", programs.wide_state),
    _case("scaler", "a gradient scaler that skips a step and changes its scale", programs.scaled),
    _case("norm", "BatchNorm, whose buffers change", model=data.with_norm),
    _case(
        "unsaved_buffer", "a buffer that training changes and state_dict() leaves out", model=data.with_unsaved_buffer
    ),
    _case("gan", "two models and two optimizers, the second stepping every other batch", programs.adversarial),
    _case("one_after_another", "two loaders one after another in each epoch", programs.one_after_another),
    _case("side_by_side", "two loaders side by side", programs.side_by_side, break_at=(6,)),
    _case("refilled", "a short loader that starts again while a long one runs", programs.refilled),
    _case("changing_loader", "another loader from the second epoch on", programs.changing_loader),
    _case("named", "a loader created for each epoch, with name=", programs.made_anew),
    _case("no_epochs", "steps to a limit, without a loop over epochs", programs.no_epochs),
    _case("ema", "an average of the weights among the objects", programs.averaged, objects=programs.average),
    _case("stopping", "early stopping that does not stop", objects=_stopping(5), break_at=(10,)),
    _case("stopping_met", "early stopping that ends the run", objects=_stopping(0), break_at=(8,), every=2),
    _case(
        "stopping_ranks",
        "early stopping whose metric differs between ranks",
        programs.stopping_on_ranks,
        objects=_stopping(2),
        break_at=(14,),
    ),
    _case("draws_elsewhere", "code that draws before, between and after the batches", programs.draws_elsewhere),
)
