"""One save of Trainer's that is written in the background: what it consists of, captured, and how it is written.

Promise: :meth:`DeferredSave.write` writes the files that Trainer would have written at the moment of the capture, and
reads nothing of the training that goes on meanwhile. It runs on the writer's thread: no accelerator, no exchange with
other ranks, no random number.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from hf_lifecycle.checkpoint.manifest import FileEntry
from hf_lifecycle.checkpoint.statefile import write_tree
from hf_lifecycle.saving.archive import TorchArchive
from hf_lifecycle.saving.direct import Blocks
from hf_lifecycle.saving.snapshot import LiveTensor, Snapshot
from hf_lifecycle.trainer.template import Template, live_tensors
from hf_lifecycle.trainer.weights import DeferredWeights

__all__ = ["DeferredSave", "RankState", "SnapshotTorn", "capture_state", "settled_copy", "snapshot_tensors", "stepping"]


class SnapshotTorn(Exception):
    """Tensors changed while they were copied; nothing was committed.

    Attributes:
        names: Which.
    """

    def __init__(self, names: list[str]) -> None:
        self.names = names
        some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        super().__init__(f"{some} changed between the save and the next optimizer step, while being copied")


@dataclass(frozen=True, slots=True)
class RankState:
    """What this rank adds to the checkpoint, but for the part of the weights, which is completed later.

    Attributes:
        file: Where it is written.
        tree: The state; ``tree["parts"]`` lacks the weights' part.
        kind: The kind of the file.
        key: The key of the weights' part.
    """

    file: Path
    tree: dict[str, Any]
    kind: str
    key: str


@dataclass(slots=True)
class DeferredSave:
    """A save that was captured.

    Attributes:
        step: The optimizer step.
        template: Which files there are.
        snapshot: The tensors.
        optimizer: The optimizer's state with tensors that lie where the live ones did.
        scheduler: The scheduler's file, if there is one.
        arguments: The file with Trainer's arguments, if there is one.
        weights: The weights' part of this rank's state.
        asked: When, by the monotonic clock.
        stall: Seconds for which training has waited for it so far.
        seconds: What the writing took, and ``size`` the bytes that were written; once it is written.
    """

    step: int
    template: Template
    snapshot: Snapshot
    optimizer: Any
    scheduler: TorchArchive | None
    weights: DeferredWeights
    asked: float
    arguments: TorchArchive | None = None
    stall: float = 0.0
    seconds: float = 0.0
    size: int = 0
    known: dict[str, FileEntry] = field(default_factory=dict)

    def write(self, folder: Path, blocks: Blocks, state: TrainerState, rank: RankState) -> None:
        """Write all files but the manifest into ``folder``, which has what Trainer wrote itself.

        Raises:
            OSError: One could not be written.
        """
        began = time.monotonic()
        for name, content in self.template.static.items():
            path = folder / name
            with _naming(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for name, layout in self.template.layouts.items():
            with self._file(folder, name, blocks) as sink:
                layout.write(sink, self.snapshot.named)
        if self.template.has_optimizer:
            archive = TorchArchive(self.optimizer, "optimizer")
            with self._file(folder, "optimizer.pt", blocks) as sink:
                archive.write(sink, lambda storage: self.snapshot.storage(storage).numpy())
        for name, small in (("scheduler.pt", self.scheduler), ("training_args.bin", self.arguments)):
            if small is not None:
                with self._file(folder, name, blocks) as sink:
                    small.write(sink, _no_storage)
        with _naming(folder / "trainer_state.json") as path:
            state.save_to_json(str(path))
        tree = {
            **rank.tree,
            "parts": {**rank.tree["parts"], rank.key: self.weights.tree(self.snapshot, self.optimizer)},
        }
        rank.file.parent.mkdir(parents=True, exist_ok=True)
        write_tree(rank.file, tree, kind=rank.kind)
        self.seconds = time.monotonic() - began
        self.size = sum(entry.size for entry in self.known.values())

    @property
    def rate(self) -> float | None:
        """Megabytes a second of the writing."""
        return self.size / self.seconds / 1e6 if self.seconds else None

    def told(self, size: int) -> dict[str, float]:
        """What the save cost, in the words of the tools that draw it; ``size``: the bytes of the checkpoint."""
        return {
            "lifecycle/save_step": float(self.step),
            "lifecycle/save_stall_ms": self.stall * 1e3,
            "lifecycle/save_seconds": time.monotonic() - self.asked,
            "lifecycle/save_bytes": float(size),
            "lifecycle/save_mb_per_second": self.rate or 0.0,
        }

    def _file(self, folder: Path, name: str, blocks: Blocks) -> Any:
        return _Known(self.known, folder, name, blocks)

    def require_settled(self) -> None:
        """Raise :class:`SnapshotTorn` unless what was written is of one moment; asked before the commit."""
        if not self.snapshot.settled:
            raise SnapshotTorn(self.snapshot.torn)


class _Known:
    """A file written in blocks, whose digest is remembered."""

    def __init__(self, known: dict[str, FileEntry], folder: Path, name: str, blocks: Blocks) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._known, self._name, self._path, self._context = known, name, path, blocks.file(path)

    def __enter__(self) -> Any:
        self._file = self._context.__enter__()
        return self._file

    def __exit__(self, *error: Any) -> None:
        with _naming(self._path):
            self._context.__exit__(*error)
        if isinstance(error[1], OSError):
            error[1].filename = error[1].filename or str(self._path)
        if error[0] is None:
            written = self._file.written()
            self._known[self._name] = FileEntry(self._name, written.size, written.xxh3_128)


@contextmanager
def _naming(path: Path) -> Iterator[Path]:
    """Let an error of the block name the file, which a failed write does not."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _no_storage(_: torch.UntypedStorage) -> Any:
    raise AssertionError("scheduler and arguments hold no tensors")


def capture_state(state: TrainerState) -> TrainerState:
    """Trainer's state as it is now."""
    kept = copy.copy(state)
    vars(kept).pop("save_to_json", None)
    kept.log_history = [dict(row) for row in state.log_history]
    kept.stateful_callbacks = copy.deepcopy(state.stateful_callbacks)
    return kept


def snapshot_tensors(model: torch.nn.Module, in_files: frozenset[str], optimizer: Any) -> list[LiveTensor]:
    """What a snapshot consists of: what training changes, and what the files are made of.

    Args:
        model: The model.
        in_files: The names of its tensors that its files are made of.
        optimizer: The tree of the optimizer's state.

    Raises:
        TypeError: A tensor of the optimizer is not plain.
    """
    found = []
    for name, tensor in live_tensors(model).items():
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        if name in in_files or tensor.requires_grad or not is_parameter:
            found.append(LiveTensor(name, tensor, at_once=not (is_parameter and tensor.requires_grad)))
    for live in _tensors_in(optimizer, "optimizer"):
        if type(live.tensor) is not torch.Tensor or live.tensor.layout is not torch.strided:
            raise TypeError(f"{type(live.tensor).__name__} ({live.name})")
        found.append(live)
    return found


def _tensors_in(tree: Any, name: str) -> Iterator[LiveTensor]:
    """The tensors of an optimizer's state, under the paths that their digests have."""
    if isinstance(tree, torch.Tensor):
        yield LiveTensor(name, tree, at_once=False)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from _tensors_in(value, f"{name}.{key}")
    elif isinstance(tree, (list, tuple)):
        for number, value in enumerate(tree):
            yield from _tensors_in(value, f"{name}.{number}")


def stepping(optimizer: Any) -> torch.optim.Optimizer | None:
    """The optimizer inside wrappers whose step is the last; None where there is none."""
    while optimizer is not None:
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            return optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        optimizer = inner
    return None


def settled_copy(tree: Any) -> Any:
    """A user's state with tensors and containers of its own."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if type(tree) is dict:
        return {key: settled_copy(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(settled_copy(value) for value in tree)
    return copy.deepcopy(tree)
