"""The newest checkpoint of an output directory and its mirror; one that only the mirror has is fetched.

Promise: what is returned lies in the output directory and verifies, every byte of it; how it is fetched, and by whom:
:mod:`hf_lifecycle.mirror.fetching`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from hf_lifecycle.argument_checks import read_directory
from hf_lifecycle.checkpoint.directory import admission
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.mirror.fetching import Search
from hf_lifecycle.mirror.settings import Mirror

__all__ = ["latest_checkpoint"]


def latest_checkpoint(
    directory: str | os.PathLike[str],
    *,
    mirror: str | os.PathLike[str] | Mirror | None = None,
    save_on_each_node: bool = False,
) -> str | None:
    """The newest checkpoint in ``directory`` of which every byte verifies; None if there is no checkpoint.

    Use ``trainer.train(resume_from_checkpoint=latest_checkpoint(output_dir))`` for the first start and for every later
    one. Each skipped checkpoint is logged with the reason.

    With several processes, call it on every rank. If ``torch.distributed`` is initialized, as it is after
    ``TrainingArguments`` or an ``Accelerator`` was created, rank 0 looks, and its answer or its error is that of every
    rank. Before that, each rank looks by itself; a training whose ranks found different checkpoints is refused.

    Args:
        directory: The output directory of the run.
        mirror: The mirror of its checkpoints. If it has a newer one, or the directory has no intact one, that one is
            fetched first. A mirror that cannot be reached is a warning if the directory has a checkpoint.
        save_on_each_node: Whether each node has a directory of its own, as with Trainer's argument of this name. The
            nodes then agree on a checkpoint that all of them have (see docs/elastic.md).

    Raises:
        NoCommonCheckpoint: The nodes have no intact checkpoint in common.
        NoUsableCheckpoint: All checkpoints are damaged. A silent fresh start would lose the run.
        NotADirectoryError: ``directory`` is a file.
        ValueError: ``directory`` is empty, a checkpoint, or the ``mirror`` itself; or that is an unknown kind of URL.
        MirrorError: The mirror cannot be reached, and the directory has no checkpoint; or it belongs to another run.
        NotEnoughSpace: The disk is too full for the checkpoint to fetch.
        RankFailed: On other ranks, any of these on rank 0.
    """
    if "torch.distributed" not in sys.modules:  # which takes long to import, and cannot be up yet
        _require_one_process(is_asked=save_on_each_node)
        return newest_checkpoint(directory, mirror=mirror)
    from hf_lifecycle.processes.nodes import Nodes, is_first_of_node
    from hf_lifecycle.processes.ranks import Ranks

    ranks, found = Ranks.current(), None
    if save_on_each_node and ranks.world_size == 1:
        _require_one_process(is_asked=True)
    elif save_on_each_node and (nodes := Nodes.of(ranks, writes=is_first_of_node(ranks))).several:
        from hf_lifecycle.mirror.node_directories import agreed_checkpoint

        place = agreed_checkpoint(
            _place_of(directory), ranks, nodes, mirror=None if mirror is None else Mirror.of(mirror)
        )
        return None if place is None else str(place)
    with ranks.agree(what="looking for the newest checkpoint"):
        if ranks.is_main:
            found = newest_checkpoint(directory, mirror=mirror)
    answer: str | None = ranks.broadcast(found, what="the newest checkpoint")
    return answer


def newest_checkpoint(
    directory: str | os.PathLike[str], *, mirror: str | os.PathLike[str] | Mirror | None = None
) -> str | None:
    """As :func:`latest_checkpoint`, as this process sees it alone."""
    place = _place_of(directory)
    if mirror is None:
        return admission.latest_checkpoint(place)
    second = Mirror.of(mirror)
    second.require_apart(place)
    return Search(place, second).run()


def _require_one_process(*, is_asked: bool) -> None:
    if is_asked and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "save_on_each_node=True: the nodes cannot agree before torch.distributed is initialized; call "
            "latest_checkpoint() after TrainingArguments or an Accelerator was created"
        )


def _place_of(directory: str | os.PathLike[str]) -> Path:
    """The output directory, absolute."""
    place = Path(os.path.abspath(os.path.expanduser(read_directory("directory", directory))))
    if manifest_path(place).is_file():
        raise ValueError(f"directory: {place} is one checkpoint; give its parent, {place.parent}")
    return place
