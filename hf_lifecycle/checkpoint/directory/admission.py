"""Which checkpoints are resumed from: only such as verify, and of these the newest.

Promise: :func:`require_whole` returns only for a checkpoint of which every byte is what its manifest says, and
:func:`latest_checkpoint` gives no other; files that a person has deleted and weights can do without are named, and
such a checkpoint is given where there is no better one. One without a manifest, as stock Trainer saves it, is whole as
far as its files tell. What is skipped is told to the event log.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hf_lifecycle.checkpoint.directory.events import EventLog
from hf_lifecycle.checkpoint.directory.listing import older_runs_in
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock, wait_for
from hf_lifecycle.checkpoint.directory.manifest import manifest_path
from hf_lifecycle.checkpoint.directory.store import (
    asides_of,
    checkpoints_in,
    hidden_folder,
    moved_aside,
    no_checkpoints_in,
    step_of,
)
from hf_lifecycle.checkpoint.directory.verification import deleted_files, edited_files, in_brief, verify
from hf_lifecycle.errors import DamagedCheckpoint, DirectoryInUse, NoUsableCheckpoint
from hf_lifecycle.messages import few

__all__ = ["latest_checkpoint", "require_checkpoint", "require_whole", "way_to_another"]

logger = logging.getLogger(__name__)


def latest_checkpoint(directory: str | os.PathLike[str]) -> str | None:
    """The newest checkpoint in ``directory`` that verifies, every byte of it; None where there is none at all.

    Each checkpoint that is skipped is logged with the reason.

    Raises:
        NoUsableCheckpoint: There are checkpoints, but every one is damaged. A silent start anew would lose the run.
    """
    damaged: list[str] = []
    without: list[tuple[int, Path, str]] = []  # files that weights can do without
    directory = os.path.abspath(os.path.expanduser(directory))  # as TrainingArguments reads it
    wait_for(directory)
    older, found = older_runs_in(Path(directory)), checkpoints_in(Path(directory))
    for step, path in found:
        if path.name in older:
            continue
        problems = verify(path)
        if not problems:
            for number, other, brief in without:
                _pass_over(Path(directory), number, other, brief)
            _tell_strangers(Path(directory), step)
            _tell_older(path, [other.name for _, other in found if other.name in older])
            return str(path)
        brief = in_brief(path, problems)
        if deleted_files(path, problems):
            without.append((step, path, brief))
            continue
        _pass_over(Path(directory), step, path, brief)
        damaged += [f"{path}: {brief}"] if edited_files(path, problems) else problems
    if without:
        _, path, brief = without[0]
        logger.warning("%s: %s; it is the newest checkpoint, and no other has all its files", path, brief)
        return str(path)
    _tell_strangers(Path(directory), -1)
    if not damaged:  # a start may have moved all of them aside
        damaged = [f"{path}: damaged, and moved aside when a run started" for path in moved_aside(Path(directory))]
    if damaged:
        damaged += [f"{name}: belongs to an older run in the same directory" for name in sorted(older)]
        raise NoUsableCheckpoint(directory, damaged)
    return None


def _pass_over(directory: Path, step: int, checkpoint: Path, why: str) -> None:
    logger.warning("%s skipped: %s", checkpoint, why)
    _tell_skipped(directory, step, checkpoint, why)


def _tell_strangers(directory: Path, found: int) -> None:
    """Say that what only looks like a newer checkpoint than the one ``found`` is skipped."""
    strangers = [path.name for step, path in no_checkpoints_in(directory) if step > found]
    if strangers:
        logger.warning(
            "%s: skipped %s: it has neither trainer_state.json nor files of hf_lifecycle, so it is no checkpoint, or "
            "Trainer was killed early in its save",
            directory,
            few(strangers),
        )


def _tell_older(newest: Path, older: Sequence[str]) -> None:
    """Say that checkpoints of a higher step are skipped."""
    beyond = [name for name in older if (step_of(Path(name)) or 0) > (step_of(newest) or 0)]
    if beyond:
        logger.warning(
            "%s is the newest checkpoint of the latest run; skipped %s, of an older run: to resume from that one, "
            "pass its path",
            newest,
            few(beyond),
        )


def require_checkpoint(path: Path) -> None:
    """Raise ``ValueError`` where ``path`` is no checkpoint, but has some in it."""
    if not any(file.is_file() for file in (manifest_path(path), path / "trainer_state.json")):
        for _, newest in checkpoints_in(path):
            raise ValueError(
                f"{path} is an output directory, not a checkpoint: give what latest_checkpoint() returns for it, or "
                f"one of its checkpoints, such as {newest.name}"
            )


def require_whole(
    checkpoint: Path,
    *,
    only: Sequence[str] = (),
    progress: bool = True,
    also: Callable[[Path], Sequence[str]] = lambda _: (),
) -> None:
    """Return if ``checkpoint`` is whole; one that is not is told to the event log.

    Args:
        checkpoint: The directory. Whoever loads from it says better what is wrong where there is none.
        only: Patterns of the files that are to be loaded; all if there are none.
        also: What else may be wrong with a checkpoint that is whole.

    Raises:
        DamagedCheckpoint: It is not whole, or was moved aside because it is not.
        ValueError: It is an output directory.
    """
    problems: Sequence[str] = ()
    if checkpoint.is_dir():
        require_checkpoint(checkpoint)
        problems = verify(checkpoint, only=only, progress=progress)
        if deleted_files(checkpoint, problems):
            logger.warning("%s: %s", checkpoint, in_brief(checkpoint, problems))
            problems = ()
        problems = problems or also(checkpoint)
    elif asides := asides_of(checkpoint):
        problems = [f"it is damaged, and was moved to {asides[-1].name} when a run started"]
    if problems:
        _tell_skipped(checkpoint.parent, None, checkpoint, in_brief(checkpoint, problems))
        raise DamagedCheckpoint(
            checkpoint, problems, _newest_beside(checkpoint, also=also), edited=edited_files(checkpoint, problems)
        )


def _newest_beside(
    checkpoint: Path, *, sealed: bool = False, also: Callable[[Path], Sequence[str]] = lambda _: ()
) -> Path | None:
    passed_over = older_runs_in(checkpoint.parent) | {checkpoint.name}
    others = (path for _, path in checkpoints_in(checkpoint.parent) if path.name not in passed_over)
    sealed_ones = (path for path in others if not sealed or manifest_path(path).is_file())
    return next((path for path in sealed_ones if not (verify(path) or also(path))), None)


def way_to_another(checkpoint: Path) -> str:
    """What to do where a checkpoint cannot be relied on: take one beside it that verifies; empty without one."""
    newest = _newest_beside(checkpoint, sealed=True)
    return "" if newest is None else f"resume from {newest}, which is intact"


def _tell_skipped(directory: Path, step: int | None, checkpoint: Path, why: str) -> None:
    """Write to the event log of ``directory`` that a checkpoint was skipped, where that disturbs no one.

    Nothing is written where no run of this package has been, by ranks other than the first, and while another process
    holds the directory: looking at a run leaves it as it is.
    """
    file = hidden_folder(directory) / "lock"
    if os.environ.get("RANK", "0") == "0" and file.is_file():
        with suppress(DirectoryInUse, OSError), DirectoryLock(file):
            EventLog(directory).write("skipped", step=step, path=checkpoint.name, why=why)
