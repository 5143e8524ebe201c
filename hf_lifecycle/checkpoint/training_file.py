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
from hf_lifecycle.checkpoint.statefile import SUFFIXES, check_suffix, read_tree, tree_from_bytes, tree_to_bytes
from hf_lifecycle.checkpoint.structure import ForeignStateError
from hf_lifecycle.early_stopping_record import read_finite, read_number
from hf_lifecycle.errors import ResumeMismatch, StateFileError
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.rng import capture_rng, rng_sources

__all__ = ["KIND", "check_training_state", "gather_rng", "read_training_state", "rng_of_rank", "tell_differences"]

logger = logging.getLogger(__name__)

KIND = "training_state"
_KEYS = frozenset({"best", "best_metric", "custom_state", "epoch", "rng", "step"})
_OTHERS = "rng_of_other_ranks"  # from rank 1 on; only in files of several ranks


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
        if set(tree) - {_OTHERS} != _KEYS:
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


def gather_rng(ranks: Ranks) -> dict[str, Any]:
    """The random numbers of every rank, as the file has them; on rank 0, which writes it, those of all."""
    own = capture_rng().state_dict()
    told = ranks.gather_bytes(tree_to_bytes(own, kind=_OTHERS), what="the random numbers of every rank")
    others = [tree_from_bytes(data, kind=_OTHERS) for data in told[1:]] if ranks.is_main else []
    return {"rng": own} | ({_OTHERS: others} if others else {})


def rng_of_rank(path: str | PathLike[str], tree: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What the file has for this rank.

    Raises:
        ResumeMismatch: It was written by another number of ranks.
    """
    everyones = [tree["rng"], *tree.get(_OTHERS, [])]
    if len(everyones) != ranks.world_size:
        raise ResumeMismatch(
            path,
            [f"it has the random numbers of {len(everyones)} ranks, and there are {ranks.world_size}"],
            "pass restore_rng=False, and seed the ranks yourself",
        )
    own: dict[str, Any] = everyones[ranks.rank]
    return own


def tell_differences(path: str | PathLike[str], saved: Mapping[str, Any], lacking: tuple[str, ...]) -> None:
    """Warn of the generators that one side lacks."""
    if lacking:
        logger.warning("%s: this machine has no %s, so what they drew will not continue", path, ", ".join(lacking))
    if unsaved := [name for name in rng_sources() if name not in saved]:
        logger.warning("%s holds no state of %s, which stay as they are", path, ", ".join(unsaved))
