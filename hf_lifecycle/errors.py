"""The errors of this package, drawn as the tree they form.

::

    LifecycleError
    ├── StateFileError          a state file is torn, foreign, hostile or of a newer format
    ├── UnsafeStateError        a state cannot be stored without pickle (also a TypeError)
    ├── StateMismatch           a state dict has missing or unknown keys (also a ValueError)
    ├── MetricNotFound          the monitored metric is not among those evaluated (also a KeyError)
    ├── ResumeMismatch          what was restored, or the run around it, is not what was saved
    ├── UnsupportedTraining     exactness cannot be had with these settings
    ├── DamagedCheckpoint       a checkpoint that was to be loaded is not what was saved; nothing of it was loaded
    ├── NoUsableCheckpoint      there are checkpoints, and every one of them is damaged or was edited
    ├── SaveFailed              a checkpoint that was being saved in the background was not committed
    ├── DirectoryInUse          another run is writing to the output directory
    ├── NotEnoughSpace          the disk has no room for another checkpoint (also an OSError)
    ├── RankUnreachable         another process of the training did not come to an exchange in time
    ├── RankFailed              another process of the training failed in what all have to do
    └── MirrorError             the second place of the checkpoints cannot be reached, or is not as it should be
        └── MirrorOfAnotherRun  it belongs to another run

Each error carries its facts as attributes, and its message says what, where and the next move.
A file that is not there stays the built-in ``FileNotFoundError``; a wrong argument stays ``ValueError``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from os import PathLike, fspath

from hf_lifecycle.messages import EXAMPLES, listed, way_on

__all__ = [
    "DamagedCheckpoint",
    "DirectoryInUse",
    "LifecycleError",
    "MetricNotFound",
    "MirrorError",
    "MirrorOfAnotherRun",
    "NoUsableCheckpoint",
    "NotEnoughSpace",
    "RankFailed",
    "RankUnreachable",
    "ResumeMismatch",
    "SaveFailed",
    "StateFileError",
    "StateMismatch",
    "UnsafeStateError",
    "UnsupportedTraining",
]


class LifecycleError(Exception):
    """Base of every error that this package raises by a name of its own."""


class StateFileError(LifecycleError):
    """A state file cannot be read. Nothing in it was executed and nothing was restored from it.

    Attributes:
        path: The file.
        reason: What is wrong with it, in one sentence.
    """

    def __init__(self, path: str | PathLike[str], reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"{path}: {reason}")


class UnsafeStateError(LifecycleError, TypeError):
    """A state holds a value that could only be stored as a pickle that runs code when loaded.

    Attributes:
        key: Where the value is, as a path into the state: ``custom_state['ema']['fn']``.
        kind: The type of the value.
    """

    def __init__(self, key: str, kind: type) -> None:
        self.key = key
        self.kind = kind
        super().__init__(
            f"{key} is a {kind.__module__}.{kind.__qualname__}, which cannot be stored safely; "
            "store numbers, strings, bytes, lists, tuples, dicts, NumPy arrays or tensors, "
            "or the object's state_dict()"
        )


class StateMismatch(LifecycleError, ValueError):
    """A state dict does not have exactly the keys its owner knows.

    Attributes:
        owner: The name of what was to be restored.
        missing: Keys that are not there.
        unknown: Keys that should not be there.
    """

    def __init__(self, owner: str, missing: Sequence[str] = (), unknown: Sequence[str] = ()) -> None:
        self.owner = owner
        self.missing = tuple(missing)
        self.unknown = tuple(unknown)
        parts = [f"missing {list(self.missing)}"] if missing else []
        parts += [f"unknown {list(self.unknown)}"] if unknown else []
        super().__init__(f"state of {owner}: {'; '.join(parts)}")


class MetricNotFound(LifecycleError, KeyError):
    """The metric that early stopping watches came in no evaluation, for as long as its patience or until the end.

    Attributes:
        monitor: The name that was looked for.
        available: The names that there are.
    """

    def __init__(self, monitor: str, available: Sequence[str]) -> None:
        self.monitor = monitor
        self.available = tuple(available)
        self.message = (
            f"early stopping monitors {monitor!r}, but evaluations gave only {sorted(available)}; "
            "pass monitor= one of these, or return the metric from compute_metrics"
        )
        super().__init__(self.message)

    def __str__(self) -> str:  # KeyError would show the repr of the message
        return self.message


class ResumeMismatch(LifecycleError):
    """A resumed run would not be the run that was saved.

    Attributes:
        checkpoint: The checkpoint directory, or None where it is not known.
        problems: Every problem found, one sentence each.
    """

    def __init__(self, checkpoint: str | PathLike[str] | None, problems: Sequence[str], advice: str = "") -> None:
        self.checkpoint = checkpoint
        self.problems = tuple(problems)
        lines = listed(self.problems)
        where = f"{checkpoint}: " if checkpoint is not None else ""
        super().__init__(f"{where}resuming would not continue the same run:{lines}" + (f"\n{advice}" if advice else ""))


class UnsupportedTraining(LifecycleError):
    """Exact resume cannot be had with these settings, and the caller asked for nothing less.

    Attributes:
        problems: Every cause, one sentence each.
    """

    def __init__(self, problems: Sequence[str], advice: str = "") -> None:
        self.problems = tuple(problems)
        lines = listed(self.problems)
        super().__init__(f"this training cannot be resumed exactly:{lines}" + (f"\n{advice}" if advice else ""))


class DamagedCheckpoint(LifecycleError):
    """A checkpoint that was named to be loaded does not verify, or could run code. Nothing of it was loaded.

    Attributes:
        checkpoint: Its directory.
        problems: What is wrong, one sentence for each file.
        newest: The newest checkpoint beside it that verifies, or None.
        edited: The files that were edited, where nothing else is wrong: ``hf-lifecycle accept`` is the way on then.
    """

    def __init__(
        self,
        checkpoint: str | PathLike[str],
        problems: Sequence[str],
        newest: str | PathLike[str] | None,
        edited: Sequence[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.problems = tuple(problems)
        self.newest = newest
        self.edited = tuple(edited)
        what = "edited since it was saved" if self.edited else "damaged"
        count = f" ({len(self.problems)} problems)" if len(self.problems) > EXAMPLES + 1 else ""
        move = f"use {fspath(newest)}, the newest that verifies" if newest is not None else "no other there verifies"
        if self.edited:
            move = f"{way_on(checkpoint)}; or {move}" if newest is not None else way_on(checkpoint)
        lines = listed(self.problems, EXAMPLES)
        super().__init__(f"{fspath(checkpoint)}: {what}, and nothing of it was loaded{count}:{lines}\n{move}")


class NoUsableCheckpoint(LifecycleError):
    """There are checkpoints in a directory, but none can be resumed from. Starting anew would lose the run.

    Attributes:
        directory: Where was looked.
        problems: What is wrong with each, newest first.
    """

    def __init__(self, directory: str | PathLike[str], problems: Sequence[str]) -> None:
        self.directory = directory
        self.problems = tuple(problems)
        lines = listed(self.problems)
        super().__init__(
            f"{directory}: every checkpoint is damaged:{lines}\nto start anew, use another output_dir or move them away"
        )


class SaveFailed(LifecycleError):
    """A checkpoint that was being saved in the background was not committed. What was committed before is there.

    Attributes:
        checkpoint: The name of the checkpoint.
        cause: What went wrong, with the file's name where there is one.
    """

    def __init__(self, checkpoint: str, cause: BaseException) -> None:
        self.checkpoint = checkpoint
        self.cause = cause
        super().__init__(
            f"{checkpoint} was not saved: {type(cause).__name__}: {cause}; what was committed before it is there: put "
            "the cause right and run the same command again"
        )


class DirectoryInUse(LifecycleError):
    """Another process is training into the same output directory.

    Attributes:
        directory: The output directory.
        holder: The other run: its process id, host and start.
    """

    def __init__(self, directory: str | PathLike[str], holder: str) -> None:
        self.directory = directory
        self.holder = holder
        super().__init__(f"{directory}: in use by {holder}; end that run, or give this one another output_dir")


class NotEnoughSpace(LifecycleError, OSError):
    """The disk has no room for another checkpoint. Nothing of it was written; ``errno`` is ``ENOSPC``.

    Attributes:
        directory: The output directory.
        needed: Bytes that the last checkpoint took; None of the first one, which filled the disk.
        free: Bytes that are free for this user.
    """

    def __init__(self, directory: str | PathLike[str], needed: int | None, free: int) -> None:
        self.directory = directory
        self.needed = needed
        self.free = free
        took = "the first one fills the disk" if needed is None else f"the last one took {needed:,} bytes"
        self.message = (
            f"{fspath(directory)}: no space for {'a' if needed is None else 'another'} checkpoint: {took}, {free:,} "
            f"{'bytes ' if needed is None else ''}are free; free some, or keep fewer checkpoints (save_total_limit), "
            "and run the same command again"
        )
        super().__init__(errno.ENOSPC, self.message)

    def __str__(self) -> str:  # OSError would put its number before the message
        return self.message


class RankUnreachable(LifecycleError):
    """Another process of the training did not come to an exchange in time: it died, hangs, or is elsewhere.

    Attributes:
        what: What the exchange was about.
        ranks: The ranks that were waited for.
        seconds: How long.
        why: More about it where more is known, else empty.
    """

    def __init__(self, what: str, ranks: Sequence[int], seconds: float, why: str = "") -> None:
        self.what = what
        self.ranks = tuple(ranks)
        self.seconds = seconds
        self.why = why
        plural = "s" if len(self.ranks) != 1 else ""
        named = ", ".join(map(str, self.ranks))
        super().__init__(
            f"{what}: rank{plural} {named} did not come within {seconds:g} s{f' ({why})' if why else ''}; see the "
            f"output of rank{plural} {named}, or give slow ranks longer (HF_LIFECYCLE_TIMEOUT, in seconds)"
        )


class RankFailed(LifecycleError):
    """Other processes of the training failed in what every one of them has to do, so none goes on.

    Attributes:
        what: What it was.
        causes: The error of each rank that failed, as text.
    """

    def __init__(self, what: str, causes: Mapping[int, str]) -> None:
        self.what = what
        self.causes = dict(causes)
        lines = listed([f"rank {rank}: {cause}" for rank, cause in self.causes.items()])
        super().__init__(f"{what}: failed on other ranks:{lines}")


class MirrorError(LifecycleError):
    """The second place of the checkpoints cannot be reached, or is not as it should be. Training goes on without it.

    Attributes:
        where: The place, or what in it.
        reason: What is wrong, in one sentence.
    """

    def __init__(self, where: str | PathLike[str], reason: str) -> None:
        self.where = where
        self.reason = reason
        super().__init__(f"{fspath(where)}: {reason}")


class MirrorOfAnotherRun(MirrorError):
    """The second place of the checkpoints belongs to another run, whose checkpoints would be mixed with this one's."""
