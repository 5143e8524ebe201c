"""What is relied on in ``Trainer`` without being promised by transformers, and what is lost where a version lacks it.

Everything that depends on one of these names has a plain way without it. Which of them are missing is said once, when
training begins.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import transformers

from hf_lifecycle.trainer.host import training_locals, unlogged_loss

__all__ = ["lost_names", "say_what_is_lost"]

logger = logging.getLogger(__name__)

_IN_PLACE = "checkpoints are written in place, as Trainer does, and may be torn by a kill"
_IN_THE_LOOP = "saves are made by Trainer, in the training loop"
_LOOP = "_inner_training_loop"
_ALL = (
    f"{_IN_PLACE}; a checkpoint is loaded before it is verified; signals end it unsaved; the loss in log rows, and "
    "what is trained outside the model, begin anew at a resume"
)
_OF_TRAINER: Mapping[str, str] = {
    "_load_from_checkpoint": "a checkpoint is loaded before it is verified",
    "_load_best_model": f"the best checkpoint is loaded before it is verified, and {_IN_THE_LOOP}",
    "_load_optimizer_and_scheduler": "whether a run of more steps is exact cannot be told",
    "_init_training_state": "a run whose epochs have different numbers of steps is refused at a resume",
    "_run_epoch": "an error that ends training leaves before the save in flight is written",
    "evaluation_loop": "an evaluation that a callback makes amid a step moves the random numbers of training",
    "get_batch_samples": "what a callback before this one changes in on_step_begin is undone in the first resumed step",
    "_save_checkpoint": _IN_PLACE,
    "_get_output_dir": _IN_PLACE,
    "save_model": _IN_THE_LOOP,
    "_save_optimizer_and_scheduler": _IN_THE_LOOP,
    "_maybe_log_save_evaluate": "a log row, an evaluation or a save that was due at a save is not made after a resume",
    "_total_loss_scalar": "the run's train_loss is the mean since the resume",
    "_globalstep_last_logged": "the loss of the first log row after a resume is not exact",
    "current_flos": "total_flos leaves out what was counted since the last log row",
}


def lost_names() -> dict[str, str]:
    """What the trainer that is training does not have, and what is lost by it.

    Returns:
        By the name that is missing; empty where all is as it should be.
    """
    seen = training_locals()
    trainer = seen.get("self")
    if trainer is None:
        return {_LOOP: _ALL}
    lost = {name: why for name, why in _OF_TRAINER.items() if getattr(trainer, name, None) is None}
    if unlogged_loss(trainer) is None:
        lost["_tr_loss"] = "the loss of the first log row after a resume leaves out the steps before it"
    if "resume_from_checkpoint" not in seen:
        lost["resume_from_checkpoint"] = "the checkpoint that train() was given is looked for by its step"
    return lost


def say_what_is_lost() -> None:
    """Warn of each missing name."""
    lost = lost_names()
    if lost:
        logger.warning(
            "transformers %s: this Trainer lacks names that hf_lifecycle relies on. What is lost:%s\n"
            "  Next: look for a newer hf_lifecycle.",
            transformers.__version__,
            "".join(f"\n  no {name}: {why}" for name, why in lost.items()),
        )
