"""The checkpoints of a directory with what their manifests say of them, as retention and readers see them.

Not asked here: whether they are whole. Reading executes nothing, and a manifest that cannot be read is as none.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path

from hf_lifecycle.checkpoint.manifest import Manifest, read_manifest
from hf_lifecycle.checkpoint.older_runs import older_runs_in
from hf_lifecycle.checkpoint.retention import CheckpointInfo
from hf_lifecycle.checkpoint.store import checkpoints_in
from hf_lifecycle.errors import StateFileError

__all__ = ["info_of", "infos_in", "infos_of_this_run"]

logger = logging.getLogger(__name__)


def infos_in(directory: Path) -> list[CheckpointInfo]:
    """Every checkpoint in ``directory``, oldest first; metric and time are None where no manifest tells them."""
    return [_info(step, path) for step, path in reversed(checkpoints_in(directory))]


def _info(step: int, path: Path) -> CheckpointInfo:
    try:
        manifest = read_manifest(path)
    except FileNotFoundError:
        return CheckpointInfo(step, path)
    except (StateFileError, OSError) as error:
        logger.warning("%s: its manifest cannot be read (%s)", path, error)
        return CheckpointInfo(step, path)
    return info_of(path, manifest)


def infos_of_this_run(directory: Path) -> list[CheckpointInfo]:
    """As :func:`infos_in`, without those of older runs: what is kept of a run does not depend on theirs."""
    older = older_runs_in(directory)
    return [info for info in infos_in(directory) if info.path.name not in older]


def info_of(path: Path, manifest: Manifest) -> CheckpointInfo:
    """What a manifest says of the checkpoint ``path``."""
    metric = manifest.metric.value if manifest.metric is not None else None
    return CheckpointInfo(manifest.step, path, metric, _time(manifest.created))


def _time(text: str) -> datetime | None:
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)
