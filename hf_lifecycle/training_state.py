"""The whole training state of one's own loop in one file: where training is, what was best, and every RNG.

Promise: a file is written wholly or not at all and is read wholly or not at all; a load that fails leaves the manager
and the process's random number generators as they were. Not stored: the model and the optimizer, which the loop saves
itself or passes in ``custom_state`` as their ``state_dict()``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, SupportsFloat

from hf_lifecycle.checkpoint.durable import make_directories
from hf_lifecycle.checkpoint.legacy import read_original
from hf_lifecycle.checkpoint.statefile import SUFFIXES, check_suffix, read_tree, write_tree
from hf_lifecycle.checkpoint.structure import ForeignStateError
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.early_stopping_record import read_finite, read_number
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.state.best import BestMetric, Mode
from hf_lifecycle.state.rng import RngState, capture_rng, restore_rng, rng_sources

__all__ = ["EarlyStopping", "TrainingStateManager"]

logger = logging.getLogger(__name__)

KIND = "training_state"
_KEYS = frozenset({"best", "best_metric", "custom_state", "epoch", "rng", "step"})


class TrainingStateManager:
    """Saves and restores training state, and keeps the best metric.

    Example:
        >>> import os, tempfile, torch
        >>> path = os.path.join(tempfile.mkdtemp(), "state.safetensors")
        >>> manager = TrainingStateManager()
        >>> manager.is_best(0.9), manager.is_best(0.7), manager.is_best(0.8)
        (True, True, False)
        >>> manager.save_state(path, epoch=3, step=300, custom_state={"lr": 0.001})
        >>> drawn = torch.rand(2)
        >>> resumed = TrainingStateManager()
        >>> resumed.load_state(path)
        {'epoch': 3, 'step': 300, 'best_metric': 0.7, 'custom_state': {'lr': 0.001}}
        >>> torch.equal(torch.rand(2), drawn), resumed.is_best(0.75)
        (True, False)
    """

    def __init__(self) -> None:
        self._best = BestMetric()

    @property
    def best_metric(self) -> float | None:
        """The best metric that :meth:`is_best` was given, or that was loaded; None before the first."""
        return self._best.value

    @best_metric.setter
    def best_metric(self, metric: SupportsFloat | None) -> None:
        self._best.value = None if metric is None else float(read_number("best_metric", metric))

    @property
    def best_epoch(self) -> float | None:
        """The epoch of the best metric; None where it is not known (yet), see :meth:`is_best`."""
        return self._best.epoch

    @best_epoch.setter
    def best_epoch(self, epoch: float | None) -> None:
        self._best.epoch = None if epoch is None else read_finite("best_epoch", epoch)

    def save_state(
        self,
        path: str | PathLike[str],
        epoch: float,
        step: int,
        best_metric: SupportsFloat | None = None,
        custom_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the training state to ``path``; what was there stays until the new file is whole.

        The state of every RNG is in it (Python, NumPy, torch on the CPU and on every device of the accelerator in
        use), and the best that :meth:`is_best` knows.

        Args:
            path: A file that ends in ``.pt`` or ``.safetensors``; folders it lacks are made.
            epoch: The epoch that is done.
            step: The steps that are done.
            best_metric: The metric to be found under this name by :meth:`load_state`, a number of the same meaning as
                those given to :meth:`is_best`. By default the best that is known.
            custom_state: Plain values, arrays and tensors, and containers of them, under string keys; see
                :mod:`hf_lifecycle.checkpoint.statefile`.

        Raises:
            UnsafeStateError: A value in ``custom_state`` cannot be stored safely; ``key`` says which.
            ValueError: Another suffix, an ``epoch``, ``step`` or ``best_metric`` that is no number.
            TypeError: ``custom_state`` is no dict.
            OSError: The file cannot be written.
        """
        check_suffix(path)
        if custom_state is not None and not isinstance(custom_state, Mapping):
            raise TypeError(f"custom_state must be a dict, got {type(custom_state).__name__}")
        epoch = read_finite("epoch", epoch)
        tree = {
            "epoch": epoch,
            "step": int(read_finite("step", step, whole=True)),
            "best_metric": self.best_metric if best_metric is None else float(read_number("best_metric", best_metric)),
            "custom_state": {} if custom_state is None else custom_state,
            "best": self._best.state_at(epoch),
            "rng": capture_rng().state_dict(),
        }
        make_directories(Path(path).parent)
        write_tree(path, tree, kind=KIND)
        self._best.saved(epoch)
        logger.info("saved the training state of epoch %s, step %s to %s", epoch, tree["step"], path)

    def load_state(self, path: str | PathLike[str], restore_rng: bool = True) -> dict[str, Any]:
        """Read a file that :meth:`save_state`, or the original project, wrote, and continue from it.

        :meth:`is_best` continues from the best that was saved: the better of the manager's own and the
        ``best_metric`` that :meth:`save_state` was given.

        Args:
            path: The file.
            restore_rng: Whether the RNGs are set as they were at the save.

        Returns:
            ``epoch``, ``step``, ``best_metric`` and ``custom_state``, which is ``{}`` where there was none. Tensors
            are on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            StateFileError: It is torn, damaged, hostile or of another program. Nothing in it was executed.
            ValueError: It ends in neither ``.pt`` nor ``.safetensors``.
        """
        tree = _read(path)
        try:
            public, best = _check(tree)
            rng, lacking = RngState.from_state_dict(tree["rng"]) if restore_rng else (None, ())
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise StateFileError(path, f"its content is not a training state ({error})") from error
        # Invariant: everything was read and checked; from here on nothing fails, and the RNGs come last.
        self._best = best
        if rng is not None:
            _tell_differences(path, tree["rng"], lacking)
            _restore(rng)
        logger.info("restored the training state of epoch %s, step %s from %s", public["epoch"], public["step"], path)
        return public

    def is_best(self, metric: SupportsFloat, mode: Mode = "min", *, epoch: float | None = None) -> bool:
        """Take one more metric and say whether it is better than all before. NaN never is; an equal one is not.

        Args:
            metric: A number, NumPy scalar or tensor of one element.
            mode: ``"min"`` if lower is better, ``"max"`` if higher is; the same in every call.
            epoch: The epoch it belongs to, for :attr:`best_epoch`. By default that of the save it stands next to: the
                save just before if no metric was judged since, else the save that follows.

        Raises:
            ValueError: ``mode`` is neither, or changed; ``metric`` is no number.
        """
        return self._best.offer(metric, mode, epoch)

    def state_dict(self) -> dict[str, Any]:
        """``best_metric``, ``best_epoch`` and ``mode``, as plain values."""
        return self._best.state_dict()

    get_state_dict = state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave, here or in the original project (which has no ``mode``).

        Raises:
            StateMismatch: Keys are missing or unknown. Nothing changed.
            ValueError: A value is not what its key holds. Nothing changed.
        """
        self._best.load_state_dict(state_dict)


_restore = restore_rng  # load_state has an argument of that name


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


def _tell_differences(path: str | PathLike[str], saved: Mapping[str, Any], lacking: tuple[str, ...]) -> None:
    if lacking:
        logger.warning("%s: this machine has no %s, so what they drew will not continue", path, ", ".join(lacking))
    if unsaved := [name for name in rng_sources() if name not in saved]:
        logger.warning("%s holds no state of %s, which stay as they are", path, ", ".join(unsaved))
