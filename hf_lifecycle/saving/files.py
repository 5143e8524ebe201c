"""The files of one checkpoint, written one after the other by the writer's thread, and what is known of each.

Promise: each file that was written without an error is on the disk, and its size and digest, taken as its bytes went
by, are in :attr:`Files.known`. An error names the file. And :func:`require_archive`, on which the files of optimizers
rest: that this torch writes an archive as it is written here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.checkpoint.manifest import FileEntry, digest_file
from hf_lifecycle.saving.archive import TorchArchive
from hf_lifecycle.saving.direct import Blocks, DigestSink
from hf_lifecycle.saving.layout import NotLearned, SafetensorsLayout
from hf_lifecycle.saving.snapshot import Snapshot, bytes_of

__all__ = ["Files", "naming", "require_archive"]


class Files:
    """Writes files into ``folder``.

    Args:
        folder: The checkpoint's staging folder.
        blocks: Through which large files go.

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

    def layout(self, name: str, layout: SafetensorsLayout, tensor: Callable[[str], torch.Tensor]) -> None:
        """Write a model's file; ``tensor`` gives the copy of each of its tensors."""
        with self._file(name) as sink:
            layout.write(sink, tensor)

    def archive(self, name: str, archive: TorchArchive, snapshot: Snapshot | None = None) -> None:
        """Write an archive whose tensors are in ``snapshot``; without one, it has none."""
        with self._file(name) as sink:
            archive.write(sink, _no_storage if snapshot is None else lambda one: snapshot.storage(one).numpy())

    @contextmanager
    def _place(self, name: str) -> Iterator[Path]:
        path = self._folder / name
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path

    @contextmanager
    def _file(self, name: str) -> Iterator[Any]:
        with self._place(name) as path:
            with self._blocks.file(path) as file:
                yield file
            written = file.written()
            self.known[name] = FileEntry(name, written.size, written.xxh3_128)


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Let an error of the block name the file, which a failed write does not."""
    try:
        yield path
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _no_storage(_: torch.UntypedStorage) -> Any:
    raise AssertionError("an archive that was said to hold no tensors has some")


def require_archive(file: Path, state: Any) -> None:
    """Raise :class:`NotLearned` unless ``file`` has the very bytes that are written here of ``state``.

    Args:
        file: What torch wrote.
        state: Of which; it has not changed since.
    """
    sink = DigestSink()
    TorchArchive(state, file.stem).write(sink, lambda storage: bytes_of(storage).cpu().numpy())
    if sink.written().xxh3_128 != digest_file(file):
        raise NotLearned(f"{file.name}: torch {torch.__version__} does not write it as expected")
