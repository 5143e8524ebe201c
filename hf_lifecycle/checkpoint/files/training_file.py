"""Files of the training state of a loop, as ``TrainingStateManager.save_state`` writes them: read and checked.

Files of the original project are read as well, whatever they are called.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from hf_lifecycle.argument_checks import read_finite, read_flag, read_number, read_path
from hf_lifecycle.checkpoint.files.durable import make_directories
from hf_lifecycle.checkpoint.files.legacy import read_original
from hf_lifecycle.checkpoint.files.statefile import (
    SUFFIXES,
    check_suffix,
    read_tree,
    tree_from_bytes,
    tree_to_bytes,
    write_tree,
)
from hf_lifecycle.checkpoint.files.structure import ForeignStateError
from hf_lifecycle.errors import ResumeMismatch, StateFileError
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric
from hf_lifecycle.state.rng.states import RngState, capture_rng, rng_sources
from hf_lifecycle.state.rng.states import restore_rng as set_generators

__all__ = ["load", "write"]

logger = logging.getLogger(__name__)

KIND = "training_state"
_KEYS = frozenset({"best", "best_metric", "custom_state", "epoch", "rng", "step"})
_OBJECTS = "objects"  # where the manager was given any
_OTHERS = "rng_of_other_ranks"  # from rank 1 on; only in files of several ranks


class Objects(Protocol):
    """The objects whose states are in the file."""

    def state_dict(self, custom_state: Any) -> dict[str, Any]: ...

    def obstacles(self, saved: Mapping[str, Any]) -> list[str]: ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> list[str]: ...


def write(
    path: str | PathLike[str], public: Mapping[str, Any], best: BestMetric, ranks: Ranks, objects: Objects | None
) -> None:
    """Write the training state of all ranks; rank 0 does, wholly or not at all.

    Args:
        public: ``epoch``, ``step``, ``best_metric`` (None for the best that is known) and ``custom_state`` (or None).
        best: The best that is known; it is told of the save.
        ranks: The processes whose generators go into the file.
        objects: Those that a manager without an accelerator was given.

    Raises:
        UnsafeStateError, ValueError, TypeError, OSError: As ``TrainingStateManager.save_state`` has it.
    """
    check_suffix(read_path("path", path))
    custom, metric = public["custom_state"], public["best_metric"]
    if custom is not None and not isinstance(custom, Mapping):
        raise TypeError(f"custom_state must be a dict, got {type(custom).__name__}")
    epoch = read_finite("epoch", public["epoch"])
    tree = {
        "epoch": epoch,
        "step": int(read_finite("step", public["step"], whole=True)),
        "best_metric": best.value if metric is None else float(read_number("best_metric", metric)),
        "custom_state": {} if custom is None else custom,
        "best": best.state_at(epoch),
        **_gather_rng(ranks),
    }
    states = {} if objects is None else objects.state_dict(tree["custom_state"])
    tree |= {_OBJECTS: states} if states else {}
    with ranks.agree(what="writing the training state"):
        if ranks.is_main:
            make_directories(Path(path).parent)
            write_tree(path, tree, kind=KIND)
    best.saved(epoch)
    logger.info("saved the training state of epoch %s, step %s to %s", epoch, tree["step"], path)


def load(
    path: str | PathLike[str], best: BestMetric, ranks: Ranks, *, restore_rng: bool, objects: Objects | None
) -> dict[str, Any]:
    """Read a file, continue from its best and, if asked, from this rank's generators; returns what the caller wants.

    Raises:
        FileNotFoundError, StateFileError, ResumeMismatch, ValueError: As ``TrainingStateManager.load_state`` has it.
    """
    restore_rng = read_flag("restore_rng", restore_rng)
    tree = _read(read_path("path", path))
    try:
        public, found = _check(tree)
        saved = _rng_of_rank(path, tree, ranks) if restore_rng else {}
        rng, lacking = RngState.from_state_dict(saved) if restore_rng else (None, ())
        given = tree.get(_OBJECTS, {})
        absent = [] if objects is None else objects.obstacles(given)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise StateFileError(path, f"its content is not a training state ({error})") from error
    problems = absent if absent or objects is None else objects.load_state_dict(given)
    if problems:
        raise ResumeMismatch(path, problems)
    # Invariant: everything was read and checked; from here on nothing fails, and the RNGs come last.
    best.load_state_dict(found.state_dict())
    if rng is not None:
        _tell_differences(path, saved, lacking)
        set_generators(rng)
    logger.info("restored the training state of epoch %s, step %s from %s", public["epoch"], public["step"], path)
    return public


def _read(path: str | PathLike[str]) -> dict[str, Any]:
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


def _check(tree: Mapping[str, Any]) -> tuple[dict[str, Any], BestMetric]:
    """What the caller gets, and the best to continue from; raises ValueError or TypeError where it is neither."""
    best = BestMetric()
    if "best" in tree:  # ours, not the original project's
        if set(tree) - {_OTHERS, _OBJECTS} != _KEYS:
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


def _gather_rng(ranks: Ranks) -> dict[str, Any]:
    """The random numbers of every rank, as the file has them; on rank 0, which writes it, those of all."""
    own = capture_rng().state_dict()
    told = ranks.gather_bytes(tree_to_bytes(own, kind=_OTHERS), what="the RNG states of every rank")
    others = [tree_from_bytes(data, kind=_OTHERS) for data in told[1:]] if ranks.is_main else []
    return {"rng": own} | ({_OTHERS: others} if others else {})


def _rng_of_rank(path: str | PathLike[str], tree: Mapping[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What the file has for this rank.

    Raises:
        ResumeMismatch: It was written by another number of ranks.
    """
    everyones = [tree["rng"], *tree.get(_OTHERS, [])]
    if len(everyones) != ranks.world_size:
        raise ResumeMismatch(
            path,
            [f"it has the RNG states of {len(everyones)} ranks, and there are {ranks.world_size} now"],
            "pass restore_rng=False, and seed the ranks yourself",
        )
    own: dict[str, Any] = everyones[ranks.rank]
    return own


def _tell_differences(path: str | PathLike[str], saved: Mapping[str, Any], lacking: tuple[str, ...]) -> None:
    """Warn of the generators that one side lacks."""
    if lacking:
        logger.warning("%s: this machine has no %s, so their RNG states are not restored", path, ", ".join(lacking))
    if unsaved := [name for name in rng_sources() if name not in saved]:
        logger.warning("%s has no RNG state of %s; those stay as they are", path, ", ".join(unsaved))
