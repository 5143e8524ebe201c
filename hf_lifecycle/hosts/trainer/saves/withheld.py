"""What Trainer does not write itself in a save that is captured, and what its file of random numbers would have.

Promise: :func:`learned_rng_file` names that file only where what Trainer has just written is, byte for byte, what
:func:`rng_states` gives. Accelerators that this does not know of are left to Trainer.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerState, TrainingArguments
from transformers.training_args import ParallelMode

from hf_lifecycle.hosts.trainer.intercept import SAVE_OPTIMIZER, SAVE_RNG
from hf_lifecycle.hosts.trainer.method_patching import overridden, replaced
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredFiles
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.checkpoint_files import require_archive
from hf_lifecycle.saving.files.layout import NotLearned

__all__ = ["learned_rng_file", "rng_states", "scheduler_file", "step_follows", "withheld"]


def rng_states(args: TrainingArguments) -> dict[str, Any]:
    """The states of the generators as ``Trainer._save_rng_state`` has them; nobody else has these objects."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        of_all = args.parallel_mode == ParallelMode.DISTRIBUTED
        states["cuda"] = torch.cuda.random.get_rng_state_all() if of_all else torch.cuda.random.get_rng_state()
    return states


def learned_rng_file(trainer: Any, folder: Path) -> str | None:
    """What the file of this process is called, looked at right after Trainer has written it into ``folder``.

    Returns:
        The name; None where Trainer wrote none, or another than would be written here.
    """
    args = trainer.args
    name = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    if overridden(trainer, [SAVE_RNG]):
        return None
    try:
        require_archive(folder / name, rng_states(args))
    except (NotLearned, FileNotFoundError):
        return None
    return name


@contextmanager
def withheld(
    trainer: Any,
    rng_file: str | None,
    captured: Callable[[], DeferredFiles | None],
    **methods: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """While Trainer saves, let it write neither optimizer nor ``trainer_state.json`` once the save is captured.

    Args:
        rng_file: Its file of random numbers, if the captured save is to have it.
        captured: Gives the save as soon as it is captured.
        methods: What else of the trainer's is replaced, as for
            :func:`~hf_lifecycle.hosts.trainer.method_patching.replaced`.
    """

    def unless_captured(own: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *given, **named: own(*given, **named) if captured() is None else None

    def rng_captured(own: Callable[..., Any]) -> Callable[..., Any]:
        def method(output_dir: str) -> None:
            save = captured()
            if save is None:
                own(output_dir)
            else:
                save.rng = rng_states(trainer.args)

        return method

    instead = {SAVE_OPTIMIZER: unless_captured, **methods}
    if rng_file is not None:
        instead[SAVE_RNG] = rng_captured
    with replaced(trainer, **instead), replaced(trainer.state, save_to_json=unless_captured):
        yield


def scheduler_file(trainer: Any) -> TorchArchive:
    """Of the schedule as it is now: a learning rate may be a tensor, which the next step changes."""
    return TorchArchive(copy.deepcopy(trainer.lr_scheduler.state_dict()), "scheduler")


def step_follows(trainer: Any, state: TrainerState) -> bool:
    """Else there is nothing for a copy to overlap with, and nothing to make up for a torn snapshot by."""
    return state.global_step < state.max_steps and not trainer.control.should_training_stop
