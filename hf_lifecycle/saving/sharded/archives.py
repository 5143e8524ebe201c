"""The archives of DeepSpeed's engine, of which each rank has its own: captured where the engine writes them.

At each save, ``engine.save_checkpoint`` runs on every rank, with all its collectives. What it hands to ``torch.save``,
by way of its ``checkpoint_engine``, is kept instead of written: all but the bytes of tensors is pickled at that moment,
and these bytes go into a snapshot. So there is no template of the content, which may be another at each save. That
torch writes such an archive as it is written here, the comparisons of the first save prove, byte by byte.

Not promised: files that the engine writes otherwise. It writes these itself, at each save.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.checkpoint_files import Files, plan_of_archive
from hf_lifecycle.saving.files.comparison import Comparison, Part
from hf_lifecycle.saving.snapshots.image import Plan
from hf_lifecycle.saving.snapshots.live import live_tensors
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, bytes_of
from hf_lifecycle.state.fingerprint import local_part, tensor_digest
from hf_lifecycle.state.proof import unwrapped
from hf_lifecycle.torch_internals import storage_id

__all__ = ["EngineTensors", "WrittenArchive", "handed_over", "obstacle_to_engine", "rest_of"]

_WRITER = "TorchCheckpointEngine"  # the one of DeepSpeed's that calls torch.save, and returns when the file is there


def obstacle_to_engine(engine: Any) -> str | None:
    """Why the archives of this engine cannot be written elsewhere; None if nothing is known against it."""
    writer = type(getattr(engine, "checkpoint_engine", None)).__name__
    if writer != _WRITER:
        return f"DeepSpeed writes its files by a {writer}"
    if engine.optimizer is None:
        return "DeepSpeed has no optimizer"
    if engine.zero_nvme_offload_optimizer():
        return "the state of the optimizer is offloaded to files"
    return None


@contextmanager
def handed_over(engines: Iterable[Any], *, is_written: bool) -> Iterator[dict[Path, WrittenArchive]]:
    """What these engines hand to ``torch.save`` within the block, by path.

    Args:
        engines: They save.
        is_written: Whether they write it, too.
    """
    archives: dict[Path, WrittenArchive] = {}

    @contextmanager
    def of(writer: Any) -> Iterator[None]:
        own = writer.save

        def save(state_dict: Any, path: str) -> None:
            if is_written:
                own(state_dict, path)
            archives[Path(path)] = WrittenArchive.of(state_dict, Path(path))

        writer.save = save
        try:
            yield
        finally:
            del writer.save  # that of the class is there again

    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(of(engine.checkpoint_engine))
        yield archives


@dataclass(frozen=True, slots=True)
class WrittenArchive:
    """What a host hands to ``torch.save``.

    Attributes:
        path: Where it writes it.
        archive: Its structure, and its storages, which are live.
    """

    path: Path
    archive: TorchArchive

    @classmethod
    def of(cls, tree: Any, path: Path) -> WrittenArchive:
        """What is written of ``tree`` to ``path``."""
        return cls(path, TorchArchive(tree, path.stem).at(path))

    @property
    def plan(self) -> Plan:
        """What the file is going to look like; the folder that it is in may be another each time."""
        return plan_of_archive(self.path.name, self.archive)

    def write(self, files: Files, folder: Path, snapshot: Snapshot) -> None:
        """Write it into the checkpoint ``folder``, with the tensors of a snapshot.

        Raises:
            OSError: It cannot be written.
        """
        files.archive(self.path.relative_to(folder).as_posix(), self.archive, snapshot, self.path.name)

    def comparison(self, folder: Path) -> ArchiveComparison:
        """How to compare the file in ``folder`` that was just written, while everything is still as it was.

        Raises:
            OSError: It is not there.
        """
        name = self.path.relative_to(folder).as_posix()
        self.path.stat()
        archive, places = self.archive, self.plan.places
        data = {storage_id(one): bytes_of(one) for one in archive.storages}
        parts: dict[Hashable, Part] = {
            key: Part(offset, str(key), data[key].dtype, data[key].shape) for key, offset in places.items()
        }
        digests = {str(key): tensor_digest(data[key]) for key in places}
        return ArchiveComparison(
            Comparison(name, lambda sink, content: archive.write(sink, lambda one: content(storage_id(one))), parts),
            digests,
        )


@dataclass(frozen=True, slots=True)
class ArchiveComparison:
    """As :class:`~hf_lifecycle.saving.files.comparison.Comparison`, with the digests of what the archive holds."""

    comparison: Comparison
    digests: Mapping[str, str]

    @property
    def name(self) -> str:
        """The file's path in the checkpoint."""
        return self.comparison.name

    def run(self, folder: Path, _: Mapping[str, str]) -> FileEntry:
        """Compare it. Raises what :meth:`Comparison.run` does."""
        return self.comparison.run(folder, self.digests)


class EngineTensors:
    """What an engine trains.

    Args:
        engine: DeepSpeed's.
        prefix: What the names of the model's tensors begin with.
        name: What those of the optimizer begin with.

    Attributes:
        live: The model's tensors, by each of their names.
        optimizer: The optimizer's state with containers of its own, and an alias in the place of each tensor.
        tensors: All of these tensors, for a snapshot; of a sharded one, this rank's part.
    """

    def __init__(self, engine: Any, prefix: str = "", name: str = "optimizer") -> None:
        model = unwrapped(engine.module)
        trained = {id(one) for one in model.parameters() if one.requires_grad}
        self.live = live_tensors(model)
        self.tensors: list[LiveTensor] = []
        for key, tensor in self.live.items():
            part, at_once = local_part(tensor), id(tensor) not in trained
            is_whole = part is tensor
            self.tensors.append(LiveTensor(prefix + key, part if is_whole else part.detach(), at_once, not is_whole))
        self.optimizer = self._aliased(engine.optimizer.state_dict(), name)

    def _aliased(self, tree: Any, name: str) -> Any:
        if isinstance(tree, Mapping):
            return {key: self._aliased(value, f"{name}.{key}") for key, value in tree.items()}
        if isinstance(tree, (list, tuple)):
            return [self._aliased(value, f"{name}.{number}") for number, value in enumerate(tree)]
        if not isinstance(tree, torch.Tensor):
            return tree
        alias = tree.detach()
        self.tensors.append(LiveTensor(name, alias, at_once=False, is_alias=True))
        return alias


def rest_of(archives: Iterable[WrittenArchive], tensors: Sequence[LiveTensor]) -> list[LiveTensor]:
    """The storages in these archives that none of the tensors lies in: nobody says who writes to them, or when."""
    seen = {storage_id(live.tensor.untyped_storage()) for live in tensors}
    found = []
    for one in archives:
        for number, storage in enumerate(one.archive.storages):
            if storage_id(storage) not in seen:
                seen.add(storage_id(storage))
                name = f"{one.path.name}, storage {number}"
                found.append(LiveTensor(name, bytes_of(storage), at_once=True, is_alias=True))
    return found
