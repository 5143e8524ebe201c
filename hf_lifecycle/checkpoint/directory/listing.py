"""The checkpoints of a directory as their manifests tell of them: which are of older runs, which are kept no longer.

A run that starts without a checkpoint, in a directory that holds some, writes into its manifests what it found there:
the attempts that saved them or, where there is no manifest, their names. What any manifest of the directory names so is
of an older run. Nothing rests on times, and a run that is resumed passes the list on, so it stays one run.

Not asked here: whether checkpoints are whole; a manifest that cannot be read is as none. Not known: whether a
checkpoint of stock Trainer, which says nothing, is of the run whose checkpoints lie beside it. It counts as such unless
it was there when a run began anew.

Promise of :func:`rotate`: nothing that the disk does there raises, since the commit before it stands. What could not be
removed is tried again at the next commit.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import Manifest, read_manifest
from hf_lifecycle.checkpoint.directory.retention import CheckpointInfo, RetentionPolicy, doomed
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, remove, step_of
from hf_lifecycle.errors import StateFileError
from hf_lifecycle.messages import few

__all__ = ["found_at_begin", "info_of", "infos_in", "infos_of_this_run", "older_attempts", "older_runs_in", "rotate"]

logger = logging.getLogger("hf_lifecycle")


def infos_in(directory: Path) -> list[CheckpointInfo]:
    """Every checkpoint in ``directory``, oldest first; metric and time are None where no manifest tells them."""
    found = _manifests_in(directory, says_why=True)
    return [_info(directory / name, manifest) for name, manifest in reversed(found.items())]


def infos_of_this_run(directory: Path) -> list[CheckpointInfo]:
    """As :func:`infos_in`, without those of older runs: what is kept of a run does not depend on theirs."""
    found = _manifests_in(directory, says_why=True)
    older = _older_among(found)
    return [_info(directory / name, manifest) for name, manifest in reversed(found.items()) if name not in older]


def _info(path: Path, manifest: Manifest | None) -> CheckpointInfo:
    return CheckpointInfo(step_of(path) or 0, path) if manifest is None else info_of(path, manifest)


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


def older_attempts(directory: Path | None, copies: Iterable[Manifest] = ()) -> frozenset[str]:
    """The attempts that are of older runs, as the manifests in ``directory`` and of ``copies`` at a mirror have it."""
    here = [] if directory is None else _manifests_in(directory).values()
    return frozenset(key for manifest in (*here, *copies) if manifest is not None for key in manifest.older)


def older_runs_in(directory: Path) -> frozenset[str]:
    """The names of the checkpoints in ``directory`` that are of older runs."""
    return _older_among(_manifests_in(directory))


def _older_among(found: Mapping[str, Manifest | None]) -> frozenset[str]:
    older = {key for manifest in found.values() if manifest is not None for key in manifest.older}
    return frozenset(name for name, manifest in found.items() if _key(name, manifest) in older)


def found_at_begin(directory: Path, resumed_from: Path | None) -> tuple[str, ...]:
    """What the manifests of a run name as older; call it when the run begins. What the user has to know is logged."""
    found = _manifests_in(directory)
    if resumed_from is not None:
        _warn_of_an_older_run(directory, resumed_from, found)
        manifest = _manifest(resumed_from)
        return () if manifest is None else manifest.older
    if found:
        logger.warning(
            "%s: this run starts from step 0 in a directory with checkpoints of another run: %s. latest_checkpoint() "
            "returns a checkpoint of this run as soon as there is one, but resume_from_checkpoint=True takes the "
            "highest step of both runs; use another output_dir, or move the old checkpoints away",
            directory,
            few(list(found)),
        )
    return tuple(sorted({_key(name, manifest) for name, manifest in found.items()}))


def _warn_of_an_older_run(directory: Path, resumed_from: Path, found: Mapping[str, Manifest | None]) -> None:
    older = _older_among(found)
    if resumed_from.parent.resolve() == directory.resolve() and resumed_from.name in older:
        logger.warning(
            "%s: resumed from an older run: a later run started in the same directory and saved %s; "
            "latest_checkpoint() returns the newest checkpoint of the later run, resume_from_checkpoint=True the "
            "highest step of both",
            resumed_from,
            few([name for name in found if name not in older]),
        )


def _key(name: str, manifest: Manifest | None) -> str:
    return name if manifest is None else manifest.attempt


def _manifests_in(directory: Path, *, says_why: bool = False) -> dict[str, Manifest | None]:
    """The checkpoints by name, newest first; ``says_why``: of a manifest that cannot be read, the reason is logged."""
    return {path.name: _manifest(path, says_why=says_why) for _, path in checkpoints_in(directory)}


def _manifest(checkpoint: Path, *, says_why: bool = False) -> Manifest | None:
    try:
        return read_manifest(checkpoint)
    except FileNotFoundError:
        return None
    except (OSError, StateFileError) as error:  # whoever resumes from it is told
        if says_why:
            logger.warning("%s: its manifest cannot be read (%s)", checkpoint, error)
        return None


def rotate(
    directory: Path, policy: RetentionPolicy, protected: Collection[Path], removed: Callable[[CheckpointInfo], object]
) -> None:
    """Remove what ``policy`` does not keep of the checkpoints of the run that saves to ``directory``.

    What is ``protected`` stays whatever the policy says; ``removed`` is told of each that is removed.
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
        logger.debug("%s removed: not kept by %r", info.path, policy)
    if left:
        why = next(iter(left.values()))
        logger.warning("%s: %s could not be removed (%s); the next save tries again", directory, few([*left]), why)
