"""Other callbacks at a save: those that read the checkpoint hear of it when it is there, and what they put in it stays.

Trainer tells of a save when the directory is written; here it gets its name at ``on_save``, when every callback before
ours has been told, since what they changed belongs to the checkpoint. So reporters that upload it are told after us,
and files that others wrote into the directory are taken into it. Not promised: that a callback of the user's before
ours finds the checkpoint there; one that reads it comes after.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from hf_lifecycle.checkpoint.manifest import files_below, manifest_path

__all__ = ["adopt_files", "let_readers_come_after", "listeners_after"]

_COARSE = 2.0  # seconds to which a file system may round its times

# The reporters of transformers that hear on_save, and when they look at the checkpoint.
_READS: Mapping[str, Callable[[Any], bool]] = {
    "WandbCallback": lambda one: getattr(getattr(one, "_log_model", None), "value", None) == "checkpoint",
    "MLflowCallback": lambda one: bool(getattr(one, "_log_artifacts", False)),
    "NeptuneCallback": lambda one: bool(getattr(one, "_should_upload_checkpoint", False)),
    "ClearMLCallback": lambda one: bool(getattr(one, "_log_model", False)),
    "FlyteCallback": lambda one: bool(getattr(one, "sync_checkpoints", False)),
    "DVCLiveCallback": lambda one: getattr(one, "_log_model", None) == "all",
    "TrackioCallback": lambda _: False,
    "SwanLabCallback": lambda _: False,
}


def _reads(callback: Any) -> bool | None:
    """Whether a reporter of transformers reads the checkpoint; None for any other callback."""
    names = (kind.__name__ for kind in type(callback).__mro__)
    return next((_READS[name](callback) for name in names if name in _READS), None)


def _place_of(part: Any, callbacks: list[Any]) -> int:
    return next((n for n, one in enumerate(callbacks) if part in getattr(one, "_parts", ())), len(callbacks))


def let_readers_come_after(trainer: Any, part: Any) -> None:
    """Move reporters that read checkpoints behind the callback that ``part`` is of."""
    handler = trainer.callback_handler
    ours = _place_of(part, handler.callbacks)
    readers = [one for one in handler.callbacks[:ours] if _reads(one)]
    if readers:
        # Invariant: a new list. The old one is being iterated, and goes on as it is.
        handler.callbacks = [one for one in handler.callbacks if one not in readers] + readers


def listeners_after(trainer: Any, part: Any) -> list[str]:
    """The classes of callbacks that may look at the checkpoint at ``on_save``, and come after that of ``part``."""
    callbacks = trainer.callback_handler.callbacks
    later = callbacks[_place_of(part, callbacks) + 1 :]
    hearing = (one for one in later if getattr(type(one), "on_save", None) is not TrainerCallback.on_save)
    return [type(one).__name__ for one in hearing if _reads(one) is not False]


def adopt_files(final: Path, staged: Path, since: float) -> list[str]:
    """Take what other callbacks wrote into ``final`` during this save over into ``staged``, which will replace it.

    Args:
        final: The checkpoint's name to be, where nothing of this save belongs yet.
        staged: Where the checkpoint lies.
        since: When the save began, in seconds since the epoch. Older files are of a checkpoint of the same step.

    Returns:
        The paths of the files, relative to the checkpoint.
    """
    if not final.is_dir() or final.is_symlink():
        return []
    manifest = manifest_path(final)
    # A checkpoint of the same step may be there: its own files are as old as its manifest, or older.
    committed = manifest.stat().st_mtime_ns if manifest.exists() else None
    adopted = []
    for path in list(files_below(final)):
        time = path.stat().st_mtime_ns
        if time < (since - _COARSE) * 1e9 or (committed is not None and time <= committed):
            continue
        name = path.relative_to(final).as_posix()
        target = staged / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        adopted.append(name)
    if committed is None and not any(files_below(final)):
        shutil.rmtree(final, ignore_errors=True)
    return adopted
