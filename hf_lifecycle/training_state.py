"""The training state of a custom training loop: in one file, or, with an accelerator, in checkpoints of the run.

Promise of the file: it is written and read completely or not at all; a failed load leaves the manager and the RNG
states as they were. Model and optimizer are in it if they are given as ``objects=``, or in ``custom_state``. Promise of
the checkpoints: an interrupted and resumed loop ends like an uninterrupted one (:mod:`hf_lifecycle.hosts.accelerate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat

from hf_lifecycle.argument_checks import read_finite, read_number
from hf_lifecycle.checkpoint.directory.retention import RetentionPolicy
from hf_lifecycle.checkpoint.files import training_file
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.processes.deadline import GivenLimit
from hf_lifecycle.processes.preemption import SIGNALS, OnPreempt
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.best import BestMetric, Mode
from hf_lifecycle.state.objects import Stateful

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hf_lifecycle.hosts.accelerate.progress import Progress
    from hf_lifecycle.hosts.accelerate.run import Run
    from hf_lifecycle.hosts.accelerate.settings import OnWorldSizeChange
    from hf_lifecycle.hosts.accelerate.single_file import GivenObjects

__all__ = ["EarlyStopping", "TrainingStateManager"]


class TrainingStateManager:
    """Saves and restores training state, and keeps the best metric.

    Without arguments it writes and reads files, with :meth:`save_state` and :meth:`load_state`. With an accelerator it
    registers itself there, so that ``accelerator.save_state`` and ``load_state`` include the RNG states of every rank,
    the position of the loop and the objects. It also runs the loop: :meth:`resume`, :meth:`epochs`, :meth:`batches`.

    Args:
        accelerator: The accelerator of the loop.
        directory: Where the checkpoints go; one that all ranks share, or with ``save_on_each_node`` one for each node.
        objects: More objects to save, by name: anything with ``state_dict()`` and ``load_state_dict()``. Each
            :class:`EarlyStopping` among them decides by the metric of rank 0 on every rank. Without an accelerator,
            they are saved in the files; include the model and the optimizer.
        keep_last: How many checkpoints to keep. Default: all.
        keep: Which checkpoints to keep, such as ``KeepLast(2) | KeepBest(1, "max")``; instead of ``keep_last``.
        seed: Of the data's random numbers. Default: that of the checkpoint resumed from, else torch's initial seed.
        strict: Whether a difference that breaks exactness is an error on resume. If False, it is a warning.
        on_world_size_change: ``"continue"``: resume with another number of processes, not exactly.
        elastic: Let batches and random numbers depend on the micro-batch, not on the rank (see docs/elastic.md).
        mirror: Where committed checkpoints are copied: a folder, an fsspec URL or a :class:`hf_lifecycle.Mirror`.
            :meth:`resume` looks there too, and :meth:`close` waits for the last copy.
        signals: Signals that save the current step and end the loop.
        on_preempt: After that save, ``"raise"``: what the signal does; ``"return"``: the loops end (:attr:`progress`).
        time_limit: End as by SIGTERM before this: seconds, timedelta, datetime, or ``"auto"`` (docs/preemption.md).

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

    def __init__(
        self,
        accelerator: Accelerator | None = None,
        directory: str | PathLike[str] | None = None,
        *,
        objects: Mapping[str, Stateful] | None = None,
        keep_last: int | None = None,
        keep: RetentionPolicy | None = None,
        seed: int | None = None,
        strict: bool = True,
        on_world_size_change: OnWorldSizeChange = "error",
        mirror: str | PathLike[str] | Mirror | None = None,
        signals: Sequence[str] = SIGNALS,
        on_preempt: OnPreempt = "raise",
        time_limit: GivenLimit | None = None,
        elastic: bool = False,
    ) -> None:
        self._best = BestMetric()
        self._run: Run | None = None  # with an accelerator
        self._given: GivenObjects | None = None  # without
        if accelerator is None and any(each is not None for each in (directory, keep, keep_last, mirror, time_limit)):
            raise ValueError("directory, keep, keep_last, mirror and time_limit need Accelerate: pass accelerator=")
        if directory is None and (mirror is not None or time_limit is not None):
            raise ValueError("mirror and time_limit need the checkpoints of directory=; pass that too")
        from hf_lifecycle.hosts.accelerate.settings import RunSettings

        how = (keep_last, keep, seed, strict, on_world_size_change, mirror, signals, on_preempt, time_limit, elastic)
        settings = RunSettings({} if objects is None else objects, *how)
        if accelerator is None:
            from hf_lifecycle.hosts.accelerate.single_file import GivenObjects

            self._given = GivenObjects(settings.objects)
        else:
            from hf_lifecycle.hosts.accelerate.run import Run

            self._run = Run(accelerator, directory, settings, self._best)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of no loop: it has the best metric, and files."""
        return {**vars(self), "_run": None}

    @property
    def _ranks(self) -> Ranks:
        return Ranks() if self._run is None else self._run.ranks

    @property
    def _loop(self) -> Run:
        if self._run is None:
            made = "copied from another" if self._given is None else "created without an accelerator"
            raise ValueError(f"this manager was {made}: create TrainingStateManager(accelerator, directory) for a loop")
        return self._run

    @property
    def progress(self) -> Progress:
        """Where the loop is: ``epoch``, ``step`` (done), ``batch`` (of the current pass), ``preempted`` (signal)."""
        return self._loop.progress

    def resume(self, checkpoint: str | PathLike[str] | None = None) -> Path | None:
        """Resume from the newest intact checkpoint; call it after ``accelerator.prepare``, before the loop.

        Args:
            checkpoint: Another checkpoint than the newest.

        Returns:
            The checkpoint, or None if there is none and the run starts.

        Raises:
            NoUsableCheckpoint: All checkpoints are damaged.
            DamagedCheckpoint: The given checkpoint is damaged; nothing of it was loaded.
            ResumeMismatch: The run differs from the one that was saved; every difference is named.
            StateFileError: A file of the checkpoint could run code, or cannot be read.
            DirectoryInUse: Another run writes to the directory.
        """
        return self._loop.resume(checkpoint)

    def epochs(self, count: int, *, max_steps: int | None = None) -> Iterator[int]:
        """The numbers of the epochs, from 0; after a resume, from the saved one. A run that has ended yields none.

        It ends before ``count`` when an :class:`EarlyStopping` among the objects has decided to stop.

        Args:
            count: Epochs of the whole run.
            max_steps: Optimizer steps of the whole run, after which :meth:`batches` ends too.
        """
        return self._loop.epochs(count, max_steps)

    def batches(self, loader: Iterable[Any], *, name: str | None = None) -> Iterator[Any]:
        """The batches of one pass over ``loader``; after a resume, from the saved one.

        Several loaders may be iterated side by side or nested, one pass of each at a time (see docs/loops.md).

        Args:
            loader: What ``accelerator.prepare`` returned, or anything else that can be iterated.
            name: Its name in checkpoints. Default: its position among the prepared loaders, or among those created in
                the body of an epoch. Pass a name if that changes between runs or epochs.
        """
        return (batch for _, batch in self._loop.batches(loader, name))

    def enumerate(self, loader: Iterable[Any], *, name: str | None = None) -> Iterator[tuple[int, Any]]:
        """Like :meth:`batches`, with the number of each batch in the pass, from 0; it continues after a resume.

        Python's own ``enumerate`` starts at 0 again when a pass is resumed. Use this one if the number decides
        something, as in manual gradient accumulation: ``if (number + 1) % 4 == 0: optimizer.step()``.

        Args:
            loader: As for :meth:`batches`.
            name: As for :meth:`batches`.
        """
        return self._loop.batches(loader, name)

    def evaluating(self) -> AbstractContextManager[None]:
        """A context for an evaluation: afterwards the RNG states of training are restored."""
        return self._loop.loop.evaluating()

    def save(self, *, metric: float | None = None, epoch_is_over: bool | None = None, wait: bool = True) -> Path:
        """Commit a checkpoint at this place of the loop, and remove those that need not be kept.

        Call it on every rank: in the loop over batches after ``optimizer.step()``, or last in an epoch's body.

        Args:
            metric: The metric of the checkpoint, for :class:`KeepBest`.
            epoch_is_over: Whether a resumed run begins with the next epoch. Default: outside the loop over batches.
                Pass False if more batches follow in this epoch.
            wait: If False, the loop continues while a thread writes the same files. The next save and the end of the
                loop wait for the thread.

        Returns:
            The checkpoint, ``directory/checkpoint-STEP``; with ``wait=False``, its future path.

        Raises:
            SaveFailed: An earlier save with ``wait=False`` failed. Checkpoints committed before it are intact.
            UnsupportedTraining: This is not a place to save, such as the middle of a gradient accumulation.
            NotEnoughSpace: The disk is too full. Earlier checkpoints are untouched.
        """
        return self._loop.save(metric, epoch_is_over, wait=wait)

    def close(self) -> None:
        """Release the directory and unregister from the accelerator; the end of the program does the same.

        Raises:
            SaveFailed: The last save, with ``wait=False``, failed.
        """
        for part in (self._run, self._given):
            if part is not None:
                part.close()

    @property
    def best_metric(self) -> float | None:
        """The best metric that :meth:`is_best` was given, or that was loaded; None before the first."""
        return self._best.value

    @best_metric.setter
    def best_metric(self, metric: SupportsFloat | None) -> None:
        self._best.value = None if metric is None else float(read_number("best_metric", metric))

    @property
    def best_epoch(self) -> float | None:
        """The epoch of the best metric; None if it is not known (yet), see :meth:`is_best`."""
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
        """Write the training state to ``path``; an existing file stays until the new one is complete.

        The file has all RNG states (Python, NumPy, torch on the CPU and on every device in use), and the best metric of
        :meth:`is_best`. With an accelerator, every rank calls it, and rank 0 writes the RNG states of all.

        Args:
            path: A file that ends in ``.pt`` or ``.safetensors``; missing folders are created.
            epoch: The epoch that was finished.
            step: The number of finished steps.
            best_metric: The metric that :meth:`load_state` returns under this name; the same metric as in
                :meth:`is_best`. Default: the best known one.
            custom_state: Plain values, arrays, tensors; see :mod:`hf_lifecycle.checkpoint.files.statefile`.

        Raises:
            UnsafeStateError: A value in ``custom_state`` cannot be stored safely; ``key`` says which.
            ValueError: Another suffix, or an ``epoch``, ``step`` or ``best_metric`` that is not a number.
            TypeError: ``custom_state`` is not a dict.
            OSError: The file cannot be written.
        """
        public = {"epoch": epoch, "step": step, "best_metric": best_metric, "custom_state": custom_state}
        training_file.write(path, public, self._best, self._ranks, self._given)

    def load_state(self, path: str | PathLike[str], restore_rng: bool = True) -> dict[str, Any]:
        """Read a file that :meth:`save_state`, or the original project, wrote, and continue from it.

        :meth:`is_best` continues from the saved best: the better one of the manager's own and the ``best_metric`` that
        :meth:`save_state` was given.

        Args:
            path: The file.
            restore_rng: Whether to restore the RNG states.

        Returns:
            ``epoch``, ``step``, ``best_metric`` and ``custom_state`` (``{}`` if there was none); tensors on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            StateFileError: The file is torn, corrupt, hostile or from another program. Nothing in it was executed.
            ResumeMismatch: Another number of ranks wrote it, or a manager with other objects.
            ValueError: The path ends in neither ``.pt`` nor ``.safetensors``.
        """
        return training_file.load(path, self._best, self._ranks, restore_rng=restore_rng, objects=self._given)

    def is_best(self, metric: SupportsFloat, mode: Mode = "min", *, epoch: float | None = None) -> bool:
        """Whether ``metric`` is better than all before. NaN never is; an equal metric is not.

        Args:
            metric: A number, NumPy scalar or tensor of one element.
            mode: ``"min"`` if lower is better, ``"max"`` if higher is; the same in every call.
            epoch: The epoch of the metric, for :attr:`best_epoch`. Default: that of the nearest save, which is the save
                just before if there was no other call since, otherwise the save that follows.

        Raises:
            ValueError: ``mode`` is neither, or has changed; ``metric`` is not a number.
        """
        return self._best.offer(metric, mode, epoch)

    def state_dict(self) -> dict[str, Any]:
        """``best_metric``, ``best_epoch`` and ``mode``, as plain values."""
        return self._best.state_dict()

    get_state_dict = state_dict

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from the result of :meth:`state_dict`, also of the original project (which has no ``mode``).

        Raises:
            StateMismatch, ValueError: Keys are missing or unknown, or a value does not fit its key. Nothing changed.
        """
        self._best.load_state_dict(state_dict)
