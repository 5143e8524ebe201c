"""The files of one checkpoint, written one after the other by the writer's thread, and what is known of each.

Promise: each file that was written without an error is on the disk, and its size and digest, taken as its bytes went
by, are in :attr:`Files.known`. An error names the file. And :func:`require_archive`, on which the files of optimizers
rest: that this torch writes an archive as it is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.direct import Blocks, DigestSink
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout
from hf_lifecycle.saving.snapshots.image import Image, Plan
from hf_lifecycle.saving.snapshots.snapshot import Snapshot, bytes_of
from hf_lifecycle.torch_internals import storage_id

__all__ = ["Files", "naming", "plan_of_archive", "plan_of_layout", "require_archive"]

Bytes = npt.NDArray[np.uint8]
_Pieces = tuple[int, list[tuple[int, Bytes]]]
T = TypeVar("T")


class Files:
    """Writes files into ``folder``.

    Attributes:
        known: What was written in blocks, by path in the folder.
    """

    def __init__(self, folder: Path, blocks: Blocks) -> None:
        self.known: dict[str, FileEntry] = {}
        self._folder = folder
        self._blocks = blocks

    @property
    def size(self) -> int:
        """Bytes of those files."""
        return sum(entry.size for entry in self.known.values())

    def plain(self, name: str, content: bytes) -> None:
        """Write a small file; the commit flushes and digests it."""
        with self._place(name) as path:
            path.write_bytes(content)

    def layout(
        self,
        name: str,
        layout: SafetensorsLayout,
        tensor: Callable[[str], torch.Tensor],
        image: Image | None = None,
    ) -> None:
        """Write a model's file.

        Args:
            tensor: Gives the copy of each of its tensors.
            image: Where the copies may lie as they do in the file.
        """
        with self._file(name, _memory(image, lambda: layout.pieces(tensor))) as sink:
            layout.write(sink, tensor)

    def small_archive(self, name: str, archive: TorchArchive) -> None:
        """Write an archive whose tensors nobody else has."""
        with self._file(name) as sink:
            archive.at(self._folder / name).write(sink, _own_bytes)

    def archive(self, name: str, archive: TorchArchive, snapshot: Snapshot, plan: str | None = None) -> None:
        """Write an archive whose tensors are in ``snapshot``; ``plan``: the name of its plan, if that is another."""

        archive = archive.at(self._folder / name)

        def content(storage: torch.UntypedStorage) -> Bytes:
            return snapshot.storage(storage).numpy()

        with self._file(name, _memory(snapshot.image(plan or name), lambda: archive.pieces(content))) as sink:
            archive.write(sink, content)

    def stream(self, name: str, write: Callable[[Any], T]) -> T:
        """Write a file by ``write``, which is given where its bytes go. Returns what that gives."""
        with self._file(name) as sink:
            return write(sink)

    @contextmanager
    def _place(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    @contextmanager
    def _file(self, name: str, image: Bytes | None = None) -> Iterator[Any]:
        with self._place(name) as path:
            with self._blocks.file(path, image) as file:
                yield file
            self.known[name] = FileEntry(name, file.size, file.xxh3_128)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Let an error of the block name the file, which a failed write does not."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _memory(image: Image | None, pieces: Callable[[], _Pieces]) -> Bytes | None:
    return image.memory if image is not None and image.holds(*pieces()) else None


def _own_bytes(storage: torch.UntypedStorage) -> Bytes:
    return bytes_of(storage).cpu().numpy()


def require_archive(file: Path, state: Any) -> None:
    """Raise :class:`NotLearned` unless ``file`` has the very bytes that are written here of ``state``.

    Args:
        file: What torch wrote.
        state: Of which; it has not changed since.
    """
    sink = DigestSink()
    TorchArchive(state, file.stem).at(file).write(sink, _own_bytes)
    if sink.xxh3_128 != digest_file(file):
        raise NotLearned(f"{file.name}: torch {torch.__version__} does not write it as expected")


def plan_of_archive(name: str, archive: TorchArchive) -> Plan:
    """What the archive is going to look like, if the optimizer's state stays as large as it is."""
    return Plan(name, *archive.places())


def plan_of_layout(name: str, layout: SafetensorsLayout, live: Mapping[str, torch.Tensor]) -> Plan:
    """What a model's file is going to look like. Of it, the whole tensors in storages of their own."""
    places = []
    for offset, place in layout.begins():
        tensor, size = live[place.name], place.end - place.begin
        storage = tensor.untyped_storage()
        if size and tensor.is_contiguous() and size == storage.nbytes():
            places.append((storage_id(storage), offset))
    return Plan(name, layout.size, dict(reversed(places)))  # a tensor that is there twice lies where it is first
