"""The names of ``Trainer`` that are relied on and not promised: no other module here has one as its own.

Where a version has one no more, what depends on it goes the plain way that :data:`RELIED_ON` tells. Which of them are
missing is reported once, when training begins.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from typing import Any

import transformers

from hf_lifecycle.relied_on import Unpromised, report_missing

__all__ = [
    "ARGUMENTS_OF_END",
    "COUNTERS",
    "END_OF_STEP",
    "EPOCH",
    "EVALUATE",
    "EVALUATION_LOOP",
    "FETCH",
    "LOAD",
    "LOAD_BEST",
    "LOAD_OPTIMIZER",
    "LOOP",
    "OUTPUT_DIR",
    "PLACE",
    "RELIED_ON",
    "SAVE",
    "SAVE_MODEL",
    "SAVE_OPTIMIZER",
    "SAVE_RNG",
    "TOTAL_LOSS",
    "TRL_BUFFERS",
    "UNLOGGED_LOSS",
    "USED_WHERE_PRESENT",
    "reads_checkpoint",
    "report_missing_names",
]

LOOP = "_inner_training_loop"
EPOCH = "_run_epoch"
LOAD = "_load_from_checkpoint"
LOAD_BEST = "_load_best_model"
LOAD_OPTIMIZER = "_load_optimizer_and_scheduler"
PLACE = "_init_training_state"
SAVE = "_save_checkpoint"
OUTPUT_DIR = "_get_output_dir"
SAVE_MODEL = ("save_model", "_save")
SAVE_OPTIMIZER = "_save_optimizer_and_scheduler"
SAVE_RNG = "_save_rng_state"
EVALUATION_LOOP = "evaluation_loop"
FETCH = "get_batch_samples"
EVALUATE = "_evaluate"
UNLOGGED_LOSS = "_tr_loss"
TOTAL_LOSS = "_total_loss_scalar"
END_OF_STEP = "_maybe_log_save_evaluate"
ARGUMENTS_OF_END = ("model", "trial", "ignore_keys_for_eval", "start_time")
COUNTERS = (
    "_total_train_tokens",  # what the trainers of TRL log as num_tokens
    TOTAL_LOSS,  # the loss of all steps that were logged
    "_globalstep_last_logged",  # over how many steps the next row's loss is the mean
    "current_flos",  # what a training that was interrupted counted, and had not yet added to total_flos
)
# What trainers of TRL keep from step to step: completions that are trained on later, and what is logged of them.
TRL_BUFFERS = ("_buffered_inputs", "_step", "_metrics", "_logs", "_current_train_step_time")

_IN_PLACE = "checkpoints are written in place, as Trainer does, and a kill may leave them incomplete"
_IN_THE_LOOP = "no background saves: Trainer makes each save, and training stops until it is written"
_NO_EVENT = "no event is raised there"
RELIED_ON = (
    Unpromised(
        LOOP,
        "its frame has the data loader, and the epoch and batch that training begins with",
        "events that were due at a save are lost at a resume",
        "train() has the trainer and the checkpoint in its frame, and calls the loop for the rest",
    ),
    Unpromised(
        "resume_from_checkpoint",
        "the checkpoint that was passed to train()",
        "the checkpoint that was passed to train() is searched by its step",
        "resume_from=, if the user passes it",
    ),
    Unpromised(
        LOAD,
        "the checkpoint is verified before the model is loaded from it",
        "a checkpoint is loaded before it is verified",
        "on_train_begin is called after the load; a replaced train() would, in a copy of the trainer, train the "
        "first one",
    ),
    Unpromised(
        LOAD_BEST,
        "the best checkpoint is complete and verified before it is loaded",
        f"the best checkpoint is loaded before it is verified, and {_IN_THE_LOOP}",
        "on_train_end is called after the load",
    ),
    Unpromised(
        LOAD_OPTIMIZER,
        "looks at the schedule before its state is loaded",
        "a longer run cannot be checked for exactness",
        "on_train_begin is called after the load",
    ),
    Unpromised(
        f"{PLACE} train_dataloader epochs_trained steps_trained_in_current_epoch",
        "the saved epoch and batch replace those that Trainer computes from the step",
        "a run whose epochs have different numbers of steps cannot be resumed",
        "ignore_data_skip changes only the batches of an epoch, not the epoch",
    ),
    Unpromised(
        EPOCH,
        "an error is raised after the save in progress is written; a run that had ended does not train",
        "an error that ends training is raised before the save in progress is written",
        "no event is raised for an error",
    ),
    Unpromised(
        EVALUATION_LOOP,
        "RNG states before an evaluation",
        "an evaluation in the middle of a step, made by a callback, changes the RNG states of training",
        _NO_EVENT,
    ),
    Unpromised(
        FETCH,
        "the state at the start of a step, before any callback runs",
        "changes that an earlier callback makes in on_step_begin are lost in the first resumed step",
        _NO_EVENT,
    ),
    Unpromised(
        f"{SAVE} {OUTPUT_DIR}",
        "a checkpoint is written in a hidden folder, and renamed into place when it is complete",
        _IN_PLACE,
        "on_save is called when the files have their final name",
    ),
    Unpromised(
        " ".join((*SAVE_MODEL, SAVE_OPTIMIZER)),
        "background saves: which files these methods write, and to capture their state instead",
        _IN_THE_LOOP,
        "on_save is called after the files are written",
    ),
    Unpromised(
        SAVE_RNG,
        "the file of RNG states is written in the background, with the rest",
        "Trainer writes the file of RNG states, in the training loop",
        "on_save is called after the file is written",
    ),
    Unpromised(
        " ".join((END_OF_STEP, *ARGUMENTS_OF_END, "grad_norm", "learning_rate")),
        "the log row, evaluation and save that were due at a save, and the values of that row",
        "a log row, an evaluation or a save that was due at a save is not made after a resume",
        "control.should_log and the like act only at the end of a step, and a row of the last step needs its "
        "gradient norm",
    ),
    Unpromised(
        EVALUATE,
        "detects a save in the middle of an evaluation",
        "a save in the middle of an evaluation is not reported",
        "on_evaluate is called after it",
    ),
    Unpromised(
        UNLOGGED_LOSS,
        "the loss since the last log row",
        "the loss of the first log row after a resume lacks the steps before the save",
        "on_log has rounded means",
    ),
    Unpromised(
        TOTAL_LOSS,
        "the loss of all steps that were logged",
        "the run's train_loss is the mean since the resume",
        "on_log has rounded means",
    ),
    Unpromised(
        "_globalstep_last_logged",
        "over how many steps a log row's loss is the mean",
        "the loss of the first log row after a resume is not exact",
        "the log history, which a trainer's log() may change",
    ),
    Unpromised(
        "current_flos",
        "the FLOPs since the last log row",
        "total_flos leaves out the FLOPs since the last log row",
        "state.total_flos has what was logged",
    ),
)
# Of other classes than Trainer: used where an object has them, so that nothing is reported where one has not.
USED_WHERE_PRESENT = (
    Unpromised(
        " ".join((COUNTERS[0], *TRL_BUFFERS)),
        "state that the trainers of TRL keep from step to step",
        "it starts from its initial value at a resume",
        "TRL does not save it",
    ),
    Unpromised(
        "_log_model _log_artifacts _should_upload_checkpoint",
        "whether a reporter of transformers reads the checkpoint in on_save, which then blocks until it is written",
        "the reporter may find no checkpoint in on_save",
        "environment variables, which the reporters read when they are created",
    ),
)
_REPORTERS: Mapping[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda one: getattr(getattr(one, "_log_model", None), "value", None) == "checkpoint",
    "MLflowCallback": lambda one: bool(getattr(one, "_log_artifacts", False)),
    "NeptuneCallback": lambda one: bool(getattr(one, "_should_upload_checkpoint", False)),
    "ClearMLCallback": lambda one: bool(getattr(one, "_log_model", False)),
    "FlyteCallback": lambda one: bool(getattr(one, "sync_checkpoints", False)),
    "DVCLiveCallback": lambda one: getattr(one, "_log_model", None) == "all",
    "TrackioCallback": lambda _: False,
    "SwanLabCallback": lambda _: False,
}


def report_missing_names(trainer: Any, seen: Container[str]) -> None:
    """Warn once of each name that a trainer lacks.

    Args:
        trainer: It; None where it cannot be seen, as no other name can be then.
        seen: The names that are no attributes of it and are there.
    """

    def has(name: str) -> bool:
        return name != LOOP if trainer is None else getattr(trainer, name, None) is not None or name in seen

    report_missing(f"transformers {transformers.__version__}: this Trainer", RELIED_ON, has)


def reads_checkpoint(callback: Any) -> bool | None:
    """Whether a reporter of transformers reads the checkpoint in ``on_save``; None for any other callback."""
    names = (kind.__name__ for kind in type(callback).__mro__)
    return next((_REPORTERS[name](callback) for name in names if name in _REPORTERS), None)
