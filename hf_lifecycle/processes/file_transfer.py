"""Files sent from one node to others, through the process group, in chunks.

Promise: a rank that cannot read or write comes to the end of the transfer all the same, so that no other one waits for
it, and raises then; a file that is not all there was not received. Called on the main thread, by the first ranks of all
nodes, within a block that all ranks have in common. Not promised: that what arrives is what was sent; the caller
compares digests. The group is one of gloo, of main memory: the backend of training may know only devices.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed as dist

from hf_lifecycle.errors import RankFailed
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["FileTransfer"]

_CHUNK = 16 << 20  # bytes; in memory once on every node
_FAILED = 1  # in the byte before a chunk


class FileTransfer:
    """Sends files among the first ranks of all nodes; made on every rank, the others included."""

    def __init__(self, ranks: Ranks, nodes: Nodes) -> None:
        self._ranks = ranks
        self._nodes = nodes
        self._group = _group(ranks, nodes)

    def send(
        self,
        files: Sequence[tuple[int, str, int]],
        folder: Path,
        lacks: Callable[[str], bool],
        advance: Callable[[int], object] = lambda _: None,
    ) -> None:
        """Send files to the nodes that lack them; called by the first ranks of all nodes alike.

        Args:
            files: For each file, the same on all: who gives it, its path in the folder, and its size.
            lacks: Whether this node lacks a file.

        Raises:
            OSError: A file could not be read, or not be written here.
            RankFailed: The connection to another node was lost. No rank waits for that node.
        """
        troubles: list[OSError] = []
        for giver, path, size in files:
            if self._nodes.rank == giver:
                trouble = self._give(folder / path, size, advance)
            else:
                trouble = self._take(giver, folder, path if lacks(path) else None, size, advance)
            troubles += [] if trouble is None else [trouble]
        if troubles:
            raise troubles[0]

    def _give(self, source: Path, size: int, advance: Callable[[int], object]) -> OSError | None:
        chunks = _chunks_of(source, size)
        for length in _lengths(size):
            chunk = torch.zeros(1 + length, dtype=torch.uint8)
            try:
                chunk[1:] = torch.frombuffer(next(chunks), dtype=torch.uint8)
            except OSError as error:
                chunk[0] = _FAILED
                self._broadcast(chunk, self._nodes.rank)
                return error
            self._broadcast(chunk, self._nodes.rank)
            advance(length)
        return None

    def _take(
        self, giver: int, folder: Path, path: str | None, size: int, advance: Callable[[int], object]
    ) -> OSError | None:
        trouble: OSError | None = None
        file = None
        try:
            file = None if path is None else _new_file(folder, path)
        except OSError as error:
            trouble = error
        for length in _lengths(size):
            chunk = torch.empty(1 + length, dtype=torch.uint8)
            self._broadcast(chunk, giver)
            if chunk[0] == _FAILED:
                trouble = None if path is None else OSError(f"{folder.name}/{path}: rank {giver} could not read it")
                break
            try:
                if file is not None and trouble is None:
                    file.write(chunk[1:].numpy().data)
            except OSError as error:
                trouble = error
            advance(length)
        try:
            if file is not None:
                file.close()  # writes what is left, and may find that the disk is full
        except OSError as error:
            trouble = trouble or error
        return trouble

    def _broadcast(self, chunk: torch.Tensor, giver: int) -> None:
        try:
            dist.broadcast(chunk, src=giver, group=self._group)
        except RuntimeError as error:
            why = f"no connection between the nodes ({str(error).splitlines()[0]})"
            lost = RankFailed("sending files", {rank: why for rank in self._nodes.leaders if rank != self._nodes.rank})
            self._ranks.withdraw(lost)
            raise lost from error


def _lengths(size: int) -> list[int]:
    whole, rest = divmod(size, _CHUNK)
    return [_CHUNK] * whole + ([rest] if rest else [])


def _chunks_of(source: Path, size: int) -> Iterator[bytearray]:
    with open(source, "rb") as file:
        for length in _lengths(size):
            data = bytearray(length)
            if file.readinto(data) != length:
                raise OSError(f"{source}: shorter than it was")
            yield data


def _new_file(folder: Path, path: str) -> IO[bytes]:
    """A file of another node, which lies in the folder whatever that node says."""
    parts = PurePosixPath(path).parts
    if not parts or PurePosixPath(path).is_absolute() or ".." in parts:
        raise OSError(f"{path}: leads out of the checkpoint")
    target = folder.joinpath(*parts)
    target.parent.mkdir(parents=True, exist_ok=True)
    return open(target, "xb")


_last: tuple[Any, tuple[int, ...], Any] | None = None  # the default group, the leaders, and their group


def _group(ranks: Ranks, nodes: Nodes) -> Any:
    """The group of the first ranks; a new one takes a call of every rank, so there is one for each training."""
    global _last
    world = dist.group.WORLD
    if _last is None or _last[0]() is not world or _last[1] != nodes.leaders:
        limit = timedelta(seconds=ranks.timeout)
        made = dist.new_group(list(nodes.leaders), timeout=limit, backend="gloo")
        _last = weakref.ref(world), nodes.leaders, made
    return _last[2]
