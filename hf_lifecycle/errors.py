"""The errors of this package, drawn as the tree they form.

::

    LifecycleError
    ├── StateFileError          a state file is torn, foreign, hostile or of a newer format
    ├── UnsafeStateError        a state cannot be stored without pickle (also a TypeError)
    ├── StateMismatch           a state dict has missing or unknown keys (also a ValueError)
    ├── MetricNotFound          the monitored metric is not among those evaluated (also a KeyError)
    ├── ResumeMismatch          what was restored, or the run around it, is not what was saved
    ├── UnsupportedTraining     exactness cannot be had with these settings
    ├── DamagedCheckpoint       a checkpoint to be loaded is not what was saved; nothing of it was loaded
    ├── NoUsableCheckpoint      there are checkpoints, and every one of them is damaged or was edited
    │   └── NoCommonCheckpoint  each node has its own directory, and there is no checkpoint that all of them can have
    ├── SaveFailed              a checkpoint that was being saved in the background was not committed
    ├── DirectoryInUse          another run is writing to the output directory
    ├── NotEnoughSpace          the disk has no room for another checkpoint (also an OSError)
    ├── RankUnreachable         another process of the training did not come to an exchange in time
    ├── RankFailed              another process of the training failed in what all have to do
    └── MirrorError             the mirror of the checkpoints cannot be reached, or is not as expected
        └── MirrorOfAnotherRun  it belongs to another run

Each error carries its facts as attributes, and its message says what, where and the next move.
A file that is not there stays the built-in ``FileNotFoundError``; a wrong argument stays ``ValueError``.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from os import PathLike, fspath
from typing import Any

from hf_lifecycle.messages import EXAMPLES, listed, way_on

__all__ = [
    "DamagedCheckpoint",
    "DirectoryInUse",
    "LifecycleError",
    "MetricNotFound",
    "MirrorError",
    "MirrorOfAnotherRun",
    "NoCommonCheckpoint",
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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, list):  # what an error tells does not change when its maker's list does
                setattr(self, name, tuple(value))

    def __reduce__(self) -> tuple[Any, ...]:
        """From its facts, so that it can be copied, and sent to another process."""
        facts = tuple(getattr(self, fact.name) for fact in fields(self)) if is_dataclass(self) else self.args
        return type(self), facts, vars(self)


@dataclass(eq=False)
class StateFileError(LifecycleError):
    """A state file cannot be read. Nothing in it was executed and nothing was restored from it."""

    path: str | PathLike[str]  #: the file
    reason: str  #: what is wrong with it, in one sentence

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(eq=False)
class UnsafeStateError(LifecycleError, TypeError):
    """A state holds a value that could only be stored as a pickle that runs code when loaded."""

    key: str  #: where the value is, as a path into the state: ``custom_state['ema']['fn']``
    kind: type  #: the type of the value

    def __str__(self) -> str:
        return (
            f"{self.key} is a {self.kind.__module__}.{self.kind.__qualname__}, which cannot be stored safely; "
            "store numbers, strings, bytes, lists, tuples, dicts, NumPy arrays or tensors, "
            "or the object's state_dict()"
        )


@dataclass(eq=False)
class StateMismatch(LifecycleError, ValueError):
    """A state dict does not have exactly the keys its owner knows."""

    owner: str  #: the name of what was to be restored
    missing: Sequence[str] = ()  #: keys that are not there
    unknown: Sequence[str] = ()  #: keys that should not be there

    def __str__(self) -> str:
        parts = [f"missing {list(self.missing)}"] if self.missing else []
        parts += [f"unknown {list(self.unknown)}"] if self.unknown else []
        return f"state of {self.owner}: {'; '.join(parts)}"


@dataclass(eq=False)
class MetricNotFound(LifecycleError, KeyError):
    """The metric that early stopping watches came in no evaluation, for as long as its patience or until the end."""

    monitor: str  #: the name that was looked for
    available: Sequence[str]  #: the names that there are

    way_on: str = "pass monitor= one of these, or return the metric from compute_metrics"  #: the next move

    def __str__(self) -> str:
        names = sorted(self.available)
        return f"early stopping monitors {self.monitor!r}, but evaluations gave only {names}; {self.way_on}"


@dataclass(eq=False)
class ResumeMismatch(LifecycleError):
    """A resumed run would not be the run that was saved."""

    checkpoint: str | PathLike[str] | None  #: the checkpoint directory, or None where it is not known
    problems: Sequence[str]  #: every problem found, one sentence each
    advice: str = ""  #: the next move, where there is one

    def __str__(self) -> str:
        where = f"{self.checkpoint}: " if self.checkpoint is not None else ""
        return f"{where}resuming would not continue the same run:{listed(self.problems)}{_below(self.advice)}"


@dataclass(eq=False)
class UnsupportedTraining(LifecycleError):
    """Exact resume cannot be had with these settings, and the caller asked for nothing less."""

    problems: Sequence[str]  #: every cause, one sentence each
    advice: str = ""  #: the next move, where there is one

    def __str__(self) -> str:
        return f"this training cannot be resumed exactly:{listed(self.problems)}{_below(self.advice)}"


def _below(advice: str) -> str:
    return f"\n{advice}" if advice else ""


@dataclass(eq=False)
class DamagedCheckpoint(LifecycleError):
    """A checkpoint that was named to be loaded does not verify, or could run code. Nothing of it was loaded."""

    checkpoint: str | PathLike[str]  #: its directory
    problems: Sequence[str]  #: what is wrong, one sentence for each file
    newest: str | PathLike[str] | None  #: the newest checkpoint beside it that verifies, or None
    #: the files that were edited, where nothing else is wrong: ``hf-lifecycle accept`` is the way on then
    edited: Sequence[str] = ()

    def __str__(self) -> str:
        what = "edited since it was saved" if self.edited else "damaged"
        count = f" ({len(self.problems)} problems)" if len(self.problems) > EXAMPLES + 1 else ""
        move = "no other checkpoint there is intact"
        if self.newest is not None:
            move = f"use {fspath(self.newest)}, the newest intact checkpoint"
        if self.edited:
            move = f"{way_on(self.checkpoint)}{f'; or {move}' if self.newest is not None else ''}"
        lines = listed(self.problems, EXAMPLES)
        return f"{fspath(self.checkpoint)}: {what}, and nothing of it was loaded{count}:{lines}\n{move}"


@dataclass(eq=False)
class NoUsableCheckpoint(LifecycleError):
    """There are checkpoints in a directory, but none can be resumed from. Starting anew would lose the run."""

    directory: str | PathLike[str]  #: where was looked
    problems: Sequence[str]  #: what is wrong with each, newest first

    def __str__(self) -> str:
        return (
            f"{self.directory}: every checkpoint is damaged:{listed(self.problems)}\nto start from step 0, use "
            "another output_dir, or move them away"
        )


class NoCommonCheckpoint(NoUsableCheckpoint):
    """Each node has a directory of its own, and there is no intact checkpoint that all of them have, or can get."""

    def __str__(self) -> str:
        return (
            f"the nodes have no intact checkpoint in common:{listed(self.problems)}\ncopy one to every node; to start "
            "from step 0, use another output_dir, or move them away"
        )


@dataclass(eq=False)
class SaveFailed(LifecycleError):
    """A checkpoint that was being saved in the background was not committed. What was committed before is there."""

    checkpoint: str  #: the name of the checkpoint
    cause: BaseException  #: what went wrong, with the file's name where there is one

    def __str__(self) -> str:
        return (
            f"{self.checkpoint} was not saved: {type(self.cause).__name__}: {self.cause}; earlier checkpoints are "
            "intact: fix the cause, and run the same command again"
        )


@dataclass(eq=False)
class DirectoryInUse(LifecycleError):
    """Another process is training into the same output directory."""

    directory: str | PathLike[str]  #: the output directory
    holder: str  #: the other run: its process id, host and start

    def __str__(self) -> str:
        return f"{self.directory}: in use by {self.holder}; end that run, or use another output_dir"


@dataclass(eq=False)
class NotEnoughSpace(LifecycleError, OSError):
    """The disk has no room for another checkpoint. Nothing of it was written; ``errno`` is ``ENOSPC``."""

    directory: str | PathLike[str]  #: the output directory
    needed: int | None  #: bytes that the last checkpoint took; None of the first one, which filled the disk
    free: int  #: bytes that are free for this user

    def __post_init__(self) -> None:
        OSError.__init__(self, errno.ENOSPC, str(self))

    def __str__(self) -> str:
        took = "the first one fills the disk" if self.needed is None else f"the last one took {self.needed:,} bytes"
        return (
            f"{fspath(self.directory)}: no space for {('a' if self.needed is None else 'another')} checkpoint: "
            f"{took}, {self.free:,} {('bytes ' if self.needed is None else '')}are free; free some space, or keep "
            "fewer checkpoints (save_total_limit), and run the same command again"
        )


@dataclass(eq=False)
class RankUnreachable(LifecycleError):
    """Another process of the training did not come to an exchange: it died, hangs, or is elsewhere."""

    what: str  #: what the exchange was about
    ranks: Sequence[int]  #: the ranks that were waited for, or that may have ended; empty where none is known
    seconds: float  #: how long they are waited for at most
    why: str = ""  #: what has become of them where that is known, else empty

    def __str__(self) -> str:
        named = f"rank{'s' if len(self.ranks) != 1 else ''} {', '.join(map(str, self.ranks))}"
        if self.why:
            return f"{self.what}: {f'{named}: {self.why}; see the output of {named}' if self.ranks else self.why}"
        return (
            f"{self.what}: {named} did not respond within {self.seconds:g} s; see the output of {named}. Every rank "
            "has to make this call: let no `if` keep one from it. If a rank is only slow, raise HF_LIFECYCLE_TIMEOUT "
            "(seconds)"
        )


@dataclass(eq=False)
class RankFailed(LifecycleError):
    """Other processes of the training failed in what every one of them has to do, so none continues."""

    what: str  #: what it was
    causes: Mapping[int, str]  #: the error of each rank that failed, as text

    def __str__(self) -> str:
        lines = listed([f"rank {rank}: {cause}" for rank, cause in self.causes.items()])
        return f"{self.what}: failed on other ranks:{lines}"


@dataclass(eq=False)
class MirrorError(LifecycleError):
    """The mirror of the checkpoints cannot be reached, or is not as it should be. Training continues without it."""

    where: str | PathLike[str]  #: the place, or what in it
    reason: str  #: what is wrong, in one sentence

    def __str__(self) -> str:
        return f"{fspath(self.where)}: {self.reason}"


class MirrorOfAnotherRun(MirrorError):
    """The mirror of the checkpoints belongs to another run, whose checkpoints would be mixed with this one's."""
