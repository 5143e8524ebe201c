"""What every save of Trainer's has that is written in the background, whoever writes model and optimizer.

Promise: what is written is what Trainer would have written at the moment of the capture, and nothing of the training
that continues meanwhile is read. It is written on the writer's thread: no accelerator, no exchange with other ranks, no
random number.
"""

from __future__ import annotations

import abc
import copy
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.engine.background_saves import Learned, Template
from hf_lifecycle.engine.deferred_proof import Deferred, DeferredProof
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.shared_saves import SharedSaves
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.saves.small_files import Owned
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.checkpoint_files import Files, naming
from hf_lifecycle.saving.files.loadable import Loadable

__all__ = ["Content", "DeferredFiles", "PartSaves", "RankState", "capture_state"]

T = TypeVar("T", bound=Template)


@dataclass(frozen=True, slots=True)
class RankState:
    """What this rank adds to the checkpoint, but for the part of the weights, which is completed later.

    Attributes:
        tree: The state; ``tree["parts"]`` lacks the weights' part.
        key: The key of the weights' part.
    """

    file: Path
    tree: dict[str, Any]
    kind: str
    key: str


@dataclass(slots=True, kw_only=True)
class DeferredFiles(Deferred, abc.ABC):
    """What every captured save of Trainer's has.

    Attributes:
        template: What the first save has shown.
        arguments: The file with Trainer's arguments.
        rng: What Trainer's file of random numbers has, if it is written here.
        state: Trainer's state, and ``rank`` that of this rank; known when the save is handed over.
        has_state: Whether there is a ``trainer_state.json`` of this rank.
    """

    template: Any
    scheduler: TorchArchive | None
    weights: DeferredProof
    files: Loadable
    arguments: TorchArchive | None = None
    rng: Mapping[str, Any] | None = None
    state: TrainerState | None = None
    rank: RankState | None = None
    has_state: bool = True

    def write_model(self, files: Files) -> None:
        """Write what ``save_model`` does, but for what its owners have written."""
        for name, content in self.template.static.items():
            files.plain(name, content)
        for name, layout in self.template.layouts.items():
            files.layout(name, layout, self.snapshot.named, self.snapshot.image(name))

    def write_small(self, files: Files, folder: Path, optimizer: Any) -> None:
        """Write what is beside model and optimizer, of which this is the copy of the state.

        Raises:
            OSError: A file could not be written.
        """
        if self.scheduler is not None:
            self.files.look_at_archive("scheduler.pt", self.scheduler)
        for name, small in (("scheduler.pt", self.scheduler), ("training_args.bin", self.arguments)):
            if small is not None:
                files.small_archive(name, small)
        if (name := self.template.rng_file) is not None and self.rng is not None:
            files.small_archive(name, TorchArchive(self.rng, Path(name).stem))
        state, rank = self.state, self.rank
        assert state is not None
        assert rank is not None
        if self.has_state:
            with naming(folder / "trainer_state.json") as path:
                state.save_to_json(str(path))
        weights = self.weights.tree(self.snapshot, {"optimizer": optimizer})
        tree = {**rank.tree, "parts": {**rank.tree["parts"], rank.key: weights}}
        rank.file.parent.mkdir(parents=True, exist_ok=True)
        write_tree(rank.file, tree, kind=rank.kind)

    def cost(self, size: int) -> dict[str, float]:
        """What the save cost, in the words of the tools that draw it; ``size``: the bytes of the checkpoint."""
        return {
            "lifecycle/save_step": float(self.step),
            "lifecycle/save_stall_ms": self.stall * 1e3,
            "lifecycle/save_seconds": time.monotonic() - self.asked,
            "lifecycle/save_bytes": float(size),
            "lifecycle/save_mb_per_second": self.rate or 0.0,
        }


class PartSaves(SharedSaves[T], abc.ABC):
    """The background saves of one trainer of which every rank writes a part; on every rank.

    Args:
        directory: Is told of each save.
        trainer: The trainer.
        weights: Their part of the state, which is completed from the snapshot.
        files: Told of what is written.
        otherwise: What it means that Trainer saves, for the log.

    Attributes:
        all_capture: Whether every rank captures the save that is due.
        began: When that was due, by the monotonic clock.
    """

    def __init__(
        self, directory: RunDirectory, trainer: Any, weights: Weights, files: Loadable, *, otherwise: str
    ) -> None:
        super().__init__(directory, host="Trainer", otherwise=otherwise)
        self._trainer = trainer
        self._weights = weights
        self._loadable = files
        self.all_capture = False
        self.began = 0.0

    @abc.abstractmethod
    def _look(self) -> str | None:
        """Look at what there is. Returns why this rank cannot capture it; empty if it may later."""

    @abc.abstractmethod
    def _captured(self, state: TrainerState, save: Callable[[], object]) -> DeferredFiles:
        """Let Trainer save with this rank's part captured; every rank captures its own."""

    @abc.abstractmethod
    def _watched(self, save: Callable[[], object]) -> Callable[[], Learned[T]]:
        """Let Trainer save. Returns what looks at what it has written."""

    def look(self) -> str | None:
        """A save is due. Returns what this rank tells the others of it, for :meth:`decide`."""
        self.began = time.monotonic()
        return self.told(self._look())

    def save(self, state: TrainerState, save: Callable[[], object]) -> DeferredFiles | None:
        """Let Trainer save: itself, watched, or with this rank's part captured, which is given then."""
        if self.is_left_by_all:
            save()
            return None
        if self.all_capture:
            return self._captured(state, save)
        look = self._watched(save)
        self.learn(state.global_step, self.began, look)
        return None

    def forget(self) -> None:
        """Training has ended: let go of the trainer."""
        self._trainer = self.template = None

    def _by_owners(self, owned: Owned) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """In the place of ``save_model``: what the files' owners write at each save, and nothing else."""

        def method(output_dir: str, *_: Any, **__: Any) -> None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            owned.write(self._trainer, output_dir)

        return lambda _: method


def capture_state(state: TrainerState) -> TrainerState:
    """Trainer's state as it is now."""
    kept = copy.copy(state)
    vars(kept).pop("save_to_json", None)
    kept.log_history = [dict(row) for row in state.log_history]
    kept.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
    return kept


class Content(Protocol):
    """What this package adds to a checkpoint of Trainer's."""

    def of_one_moment(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> AbstractContextManager[None]:
        """Within it a save runs: what is added is of the moment at which it began."""

    def add(self, staged: Path, args: TrainingArguments, state: TrainerState, *, deferred: bool) -> RankState | None:
        """Write this rank's state into ``staged``; or, ``deferred``, capture it to be written later."""
