"""Removes the checkpoints that a policy no longer keeps, once a newer one is committed.

Promise: nothing that the disk does here raises: the commit before it stands. What could not be removed is tried again
at the next commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from pathlib import Path

from hf_lifecycle.checkpoint.directory.listing import infos_of_this_run
from hf_lifecycle.checkpoint.directory.retention import CheckpointInfo, RetentionPolicy, doomed
from hf_lifecycle.checkpoint.directory.store import remove
from hf_lifecycle.messages import few

__all__ = ["rotate"]

logger = logging.getLogger("hf_lifecycle")


def rotate(
    directory: Path, policy: RetentionPolicy, protected: Collection[Path], removed: Callable[[CheckpointInfo], object]
) -> None:
    """Remove what ``policy`` does not keep of the checkpoints of the run that saves to ``directory``.

    Args:
        directory: The output directory.
        policy: What is kept.
        protected: What stays whatever the policy says.
        removed: Is told of each that is removed.
    """
    left: dict[str, OSError] = {}
    try:
        unwanted = doomed(infos_of_this_run(directory), policy, protected)
    except OSError as error:
        unwanted, left = [], {"older checkpoints": error}
    for info in unwanted:
        try:
            remove(info.path)
        except OSError as error:
            left[info.path.name] = error
            continue
        removed(info)
        logger.info("%s removed: not kept by %r", info.path, policy)
    if left:
        why = next(iter(left.values()))
        logger.warning("%s: %s could not be removed (%s); the next save tries again", directory, few([*left]), why)
