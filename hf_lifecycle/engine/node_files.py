"""The files of one save on nodes that share no disk: each node gets what only ranks of other nodes have written.

Promise: afterwards every node has every file of the checkpoint, so that any one of them can give it to all others. What
each node has written itself stays as it is.
"""

from __future__ import annotations

from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.processes.file_transfer import FileTransfer
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["complete"]


def complete(folder: Path, nodes: Nodes, ranks: Ranks) -> None:
    """Give every node the files of all; on every rank, when all ranks have written theirs.

    Args:
        folder: Where this node's are.

    Raises:
        OSError: A file could not be read or written, or did not arrive as it was sent.
        RankFailed: That happened on another rank.
    """
    with ranks.agree(what="giving each node the files of all ranks"):
        transfer = FileTransfer(ranks, nodes)
        found = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files_below(folder)}
        told = ranks.gather(found if nodes.leads else {}, what="comparing the files of a save")
        sizes = {path: size for files in reversed(told) for path, size in files.items()}
        givers = {path: next(rank for rank in nodes.leaders if path in told[rank]) for path in sorted(sizes)}
        moved = [path for path in givers if any(path not in told[rank] for rank in nodes.leaders)]
        if nodes.leads:
            files = [(givers[path], path, sizes[path]) for path in moved]
            transfer.send(files, folder, lambda path: path not in found)
        digests = {path: digest_file(folder / path) for path in moved} if nodes.leads else {}
        digests_of = ranks.gather(digests, what="comparing the files that were sent")
        wrong = [path for path in moved if len({digests_of[rank][path] for rank in nodes.leaders}) > 1]
        if wrong:
            raise OSError(f"{folder / wrong[0]}: did not arrive as it was sent")
