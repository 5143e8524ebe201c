"""The whole training state of a loop of one's own: in one file, or, with an accelerator, in checkpoints of the run.

Promise of the file: it is written wholly or not at all and is read wholly or not at all; a load that fails leaves the
manager and the process's random number generators as they were. Model and optimizer are in it where they are given as
``objects=``, or their ``state_dict()`` in ``custom_state``. Promise of the checkpoints: a loop that was broken off and
resumed ends as the one that was not (:mod:`hf_lifecycle.hosts.accelerate`).
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
    registers itself there, so that ``accelerator.save_state`` and ``load_state`` carry every rank's random numbers, the
    loop's position and the objects by name; and it runs the loop: :meth:`resume`, :meth:`epochs`, :meth:`batches`.

    Args:
        accelerator: That of the loop.
        directory: Where the run's checkpoints go; the same on every rank, on a file system that all ranks share.
        objects: More state by name: anything with ``state_dict()`` and ``load_state_dict()``. Each
            :class:`EarlyStopping` among them decides by rank 0's metric on every rank. Without an accelerator they are
            in the files, the model and the optimizer among them.
        keep_last: How many checkpoints are kept; by default all.
        keep: Which are kept, such as ``KeepLast(2) | KeepBest(1, "max")``; in place of ``keep_last``.
        seed: Of the data's streams of random numbers. By default torch's initial seed, which ``set_seed`` sets, and
            after a resume that of the checkpoint.
        strict: Whether a difference that breaks exactness is an error on resume. If False, it is a warning.
        on_world_size_change: ``"continue"``: a resume by another number of processes goes on, not exactly.
        mirror: A second place for the checkpoints: a folder, an fsspec URL or a :class:`hf_lifecycle.Mirror`. Rank 0
            copies to it in the background, :meth:`resume` looks there too, and :meth:`close` waits for the last copy.
        signals: Which signals end the loop at the next step boundary, saved.
        on_preempt: ``"raise"``: then the signal does what it does; ``"return"``: the loops end, see :attr:`progress`.

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
    ) -> None:
        self._best = BestMetric()
        self._run: Run | None = None  # with an accelerator
        self._given: GivenObjects | None = None  # without
        if accelerator is None and any(each is not None for each in (directory, keep, keep_last, mirror)):
            raise ValueError("directory, keep, keep_last and mirror belong to accelerate: give accelerator=")
        if mirror is not None and directory is None:
            raise ValueError("mirror: what is copied are the checkpoints of directory=; give that too")
        from hf_lifecycle.hosts.accelerate.settings import RunSettings

        how = (keep_last, keep, seed, strict, on_world_size_change, mirror, signals, on_preempt)
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
            raise ValueError(
                "this needs an accelerator, which a copy has not: TrainingStateManager(accelerator, directory)"
            )
        return self._run

    @property
    def progress(self) -> Progress:
        """Where the loop is: ``epoch``, ``step`` (taken), ``batch`` (of the pass at hand), ``preempted`` (signal)."""
        return self._loop.progress

    def resume(self, checkpoint: str | PathLike[str] | None = None) -> Path | None:
        """Go on from the newest checkpoint that verifies; call it after ``accelerator.prepare``, before the loop.

        Args:
            checkpoint: Another one than the newest.

        Returns:
            The checkpoint, or None where there is none and the run starts.

        Raises:
            NoUsableCheckpoint: There are checkpoints, and all are damaged.
            DamagedCheckpoint: The one that was given is; nothing of it was loaded.
            ResumeMismatch: The run would not be the one that was saved; every difference is named.
            StateFileError: A file of the checkpoint could run code, or cannot be read.
            DirectoryInUse: Another run writes to the directory.
        """
        return self._loop.resume(checkpoint)

    def epochs(self, count: int, *, max_steps: int | None = None) -> Iterator[int]:
        """The numbers of the epochs, from 0; after a resume, from the saved one. A run that has ended gives none.

        It ends before ``count`` when an :class:`EarlyStopping` among the objects has decided to stop.

        Args:
            count: Epochs of the whole run.
            max_steps: Optimizer steps of the whole run, after which :meth:`batches` ends too.
        """
        return self._loop.epochs(count, max_steps)

    def batches(self, loader: Iterable[Any], *, name: str | None = None) -> Iterator[Any]:
        """The batches of one pass over ``loader``; after a resume, from the saved one.

        Several loaders may be iterated side by side or within each other, one pass of each at once (see docs/loops.md).

        Args:
            loader: What ``accelerator.prepare`` returned, or anything else that can be iterated.
            name: What it is called in checkpoints. By default its place among those prepared, or among those that are
                made in an epoch's body; to be given where that changes from run to run, or from epoch to epoch.
        """
        return (batch for _, batch in self._loop.batches(loader, name))

    def enumerate(self, loader: Iterable[Any], *, name: str | None = None) -> Iterator[tuple[int, Any]]:
        """As :meth:`batches`, each batch with its number within the pass, from 0, which goes on after a resume.

        Python's own ``enumerate`` would begin at 0 again where a pass is resumed. Use this one where the number decides
        something, as when gradients are accumulated by hand: ``if (number + 1) % 4 == 0: optimizer.step()``.

        Args:
            loader: As for :meth:`batches`.
            name: As for :meth:`batches`.
        """
        return self._loop.batches(loader, name)

    def evaluating(self) -> AbstractContextManager[None]:
        """Around an evaluation: training's random numbers go on after it as if it had not been."""
        return self._loop.evaluating()

    def save(self, *, metric: float | None = None, epoch_is_over: bool | None = None, wait: bool = True) -> Path:
        """Commit a checkpoint of this place of the loop, and remove those that are not kept.

        Call it on every rank: in the loop over batches after ``optimizer.step()``, or last in an epoch's body.

        Args:
            metric: What the checkpoint is judged by, for :class:`KeepBest`.
            epoch_is_over: Whether a resumed run begins with the next epoch. By default so outside the loop over
                batches. False where more batches follow in this epoch.
            wait: If False, the loop goes on while a thread writes the same files; the first such save of a run waits.
                The next save and the loop's end wait for the thread.

        Returns:
            The checkpoint, ``directory/checkpoint-STEP``; with ``wait=False``, where it will be.

        Raises:
            SaveFailed: A save before, with ``wait=False``, went wrong. What was committed before that is there.
            UnsupportedTraining: Not at this place, such as in the middle of a gradient accumulation.
            NotEnoughSpace: The disk has no room for it. What was committed before is untouched.
        """
        return self._loop.save(metric, epoch_is_over, wait=wait)

    def close(self) -> None:
        """Give the directory free and take back what was registered with the accelerator; a program's end does too.

        Raises:
            SaveFailed: The last save, with ``wait=False``, went wrong.
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

        The state of every RNG is in it (Python, NumPy, torch on the CPU and on every device in use), and the best that
        :meth:`is_best` knows. With an accelerator every rank calls it, and rank 0 writes the RNGs of all.

        Args:
            path: A file that ends in ``.pt`` or ``.safetensors``; folders it lacks are made.
            epoch: The epoch that is done.
            step: The steps that are done.
            best_metric: The metric to be found under this name by :meth:`load_state`, a number of the same meaning as
                those given to :meth:`is_best`. By default the best that is known.
            custom_state: Plain values, arrays, tensors; see :mod:`hf_lifecycle.checkpoint.files.statefile`.

        Raises:
            UnsafeStateError: A value in ``custom_state`` cannot be stored safely; ``key`` says which.
            ValueError: Another suffix, an ``epoch``, ``step`` or ``best_metric`` that is no number.
            TypeError: ``custom_state`` is no dict.
            OSError: The file cannot be written.
        """
        public = {"epoch": epoch, "step": step, "best_metric": best_metric, "custom_state": custom_state}
        training_file.write(path, public, self._best, self._ranks, self._given)

    def load_state(self, path: str | PathLike[str], restore_rng: bool = True) -> dict[str, Any]:
        """Read a file that :meth:`save_state`, or the original project, wrote, and continue from it.

        :meth:`is_best` continues from the best that was saved: the better of the manager's own and the
        ``best_metric`` that :meth:`save_state` was given.

        Args:
            path: The file.
            restore_rng: Whether the RNGs are set as they were at the save.

        Returns:
            ``epoch``, ``step``, ``best_metric`` and ``custom_state``, ``{}`` where there was none; tensors on the CPU.

        Raises:
            FileNotFoundError: There is no such file.
            StateFileError: It is torn, damaged, hostile or of another program. Nothing in it was executed.
            ResumeMismatch: Another number of ranks wrote it, or a manager that was given other objects.
            ValueError: It ends in neither ``.pt`` nor ``.safetensors``.
        """
        return training_file.load(path, self._best, self._ranks, restore_rng=restore_rng, objects=self._given)

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
