"""A checkpoint that one node gives to others, where nodes share no disk.

Promise: what arrives is staged, compared with the giver's manifest, and committed as any other, so that a kill
meanwhile leaves nothing that bears a checkpoint's name. What could not be read or written on one node is an error on
all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.manifest import manifest_path, parse_manifest
from hf_lifecycle.checkpoint.files.progress_bar import reading
from hf_lifecycle.mirror.fetching import room_for
from hf_lifecycle.mirror.places import commit_copy
from hf_lifecycle.processes.file_transfer import FileTransfer
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks

__all__ = ["give_checkpoint"]

logger = logging.getLogger("hf_lifecycle")


def give_checkpoint(final: Path, giver: int, lacking: Sequence[int], ranks: Ranks, nodes: Nodes) -> None:
    """Send a checkpoint to the nodes that lack it; called on every rank.

    Args:
        final: The checkpoint on this rank's node.
        giver: The rank whose node has it intact.
        lacking: The first ranks of the nodes that lack it, or have another or a damaged one of this name.

    Raises:
        NotEnoughSpace: The disk of this node has no room for it.
        OSError: A file could not be read or written here.
        MirrorError: What arrived is not what was sent.
        RankFailed: Any of these on another rank.
    """
    with ranks.agree(what=f"reading the manifest of {final.name}"):
        own = manifest_path(final).read_bytes() if ranks.rank == giver else b""
    told = ranks.gather_bytes(own, what=f"the manifest of {final.name}")
    manifest, staged, takes = parse_manifest(manifest_path(final), told[giver]), final, ranks.rank in lacking
    size = sum(entry.size for entry in manifest.files)
    with ranks.agree(what=f"making room for {final.name}"):
        if takes:
            staged = room_for(final, size)
            staged.mkdir()
    try:
        with ranks.agree(what=f"giving {final.name} to the nodes that lack it"):
            transfer = FileTransfer(ranks, nodes)
            if nodes.leads:
                files = [(giver, entry.path, entry.size) for entry in manifest.files]
                to = ", ".join(map(str, lacking))
                with reading(f"sending {final.name} from rank {giver} to rank {to}", size) as advance:
                    transfer.send(files, staged, lambda _: takes, advance)
            if takes:
                if final.exists():
                    aside = store.move_aside(final).name
                    logger.warning("%s is not intact, or of another save; moved to %s", final, aside)
                commit_copy(staged, final, manifest)
                logger.info("%s: fetched from the node of rank %d", final, giver)
    finally:
        if takes:
            store.discard(staged)
