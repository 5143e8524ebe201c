"""Trainer's own file of random numbers, for a save in the background: captured at the save, written with the rest.

Promise: :func:`learned_rng_file` names it only where what Trainer has just written is, byte for byte, what
:func:`rng_states` gives. Accelerators that this does not know of are left to Trainer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from hf_lifecycle.hosts.trainer.intercept import SAVE_RNG
from hf_lifecycle.hosts.trainer.method_patching import overridden
from hf_lifecycle.saving.files.checkpoint_files import require_archive
from hf_lifecycle.saving.files.layout import NotLearned

__all__ = ["learned_rng_file", "rng_states"]


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
