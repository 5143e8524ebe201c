"""Files of the training state of a loop, as ``TrainingStateManager.save_state`` writes them: read and checked.

Files of the original project are read as well, whatever they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.legacy import read_original
from hf_lifecycle.checkpoint.statefile import SUFFIXES, check_suffix, read_tree
from hf_lifecycle.checkpoint.structure import ForeignStateError
from hf_lifecycle.early_stopping_record import read_finite, read_number
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.rng import rng_sources

__all__ = ["KIND", "check_training_state", "read_training_state", "tell_differences"]

logger = logging.getLogger(__name__)

KIND = "training_state"
_KEYS = frozenset({"best", "best_metric", "custom_state", "epoch", "rng", "step"})


def read_training_state(path: str | PathLike[str]) -> dict[str, Any]:
    """The tree of a file of ours or of the original project, whose files may have any name."""
    if Path(path).suffix not in SUFFIXES:
        try:
            return read_original(path)
        except StateFileError as error:
            if isinstance(error.__cause__, ForeignStateError):
                check_suffix(path)
            raise
    try:
        return read_tree(path, kind=KIND)
    except StateFileError as error:
        if Path(path).suffix != ".pt" or not isinstance(error.__cause__, ForeignStateError):
            raise
    return read_original(path)


def check_training_state(tree: Mapping[str, Any]) -> tuple[dict[str, Any], BestMetric]:
    """What the caller gets, and the best to continue from; raises ValueError or TypeError where it is neither."""
    best = BestMetric()
    if "best" in tree:  # ours, not the original project's
        if set(tree) != _KEYS:
            raise ValueError(f"its keys are {sorted(tree)}, not {sorted(_KEYS)}")
        best.load_state_dict(tree["best"])
    metric = tree["best_metric"]
    public = {
        "epoch": read_finite("epoch", tree["epoch"]),
        "step": int(read_finite("step", tree["step"], whole=True)),
        "best_metric": None if metric is None else float(read_number("best_metric", metric)),
        "custom_state": tree["custom_state"],
    }
    if not isinstance(public["custom_state"], dict):
        raise TypeError(f"custom_state is a {type(public['custom_state']).__name__}, not a dict")
    best.adopt(public["best_metric"], public["epoch"])
    return public, best


def tell_differences(path: str | PathLike[str], saved: Mapping[str, Any], lacking: tuple[str, ...]) -> None:
    """Warn of the generators that one side lacks."""
    if lacking:
        logger.warning("%s: this machine has no %s, so what they drew will not continue", path, ", ".join(lacking))
    if unsaved := [name for name in rng_sources() if name not in saved]:
        logger.warning("%s holds no state of %s, which stay as they are", path, ", ".join(unsaved))
