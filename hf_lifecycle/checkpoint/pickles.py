"""Which files of a checkpoint would run code if they were loaded: pickles that ``weights_only`` does not take.

Looked at are the files by these names, which Trainer and accelerate unpickle on a resume. Tensors are not read for it.
``training_args.bin`` is a pickle of a class in every checkpoint of Trainer's; nobody loads it on a resume, and nothing
here opens it. Files by other names are the user's own, and neither Trainer nor this package loads them.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from hf_lifecycle.checkpoint.manifest import files_below
from hf_lifecycle.checkpoint.structure import DamagedStateError

# torch is imported when there is something to look at.

__all__ = ["refused_pickles"]

_LOADED = (
    "optimizer.pt",
    "optimizer*.bin",
    "rank*-optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "pytorch_model*.bin",
    "adapter_model*.bin",
)


def refused_pickles(checkpoint: Path) -> list[str]:
    """What is wrong with the pickles of ``checkpoint``, file by file; nothing, if loading them can run nothing.

    Raises:
        OSError: A file cannot be read.
    """
    found = [path for path in files_below(checkpoint) if any(fnmatch(path.name, pattern) for pattern in _LOADED)]
    return [f"{path}: {reason}" for path in found if (reason := _reason_to_refuse(path)) is not None]


def _reason_to_refuse(path: Path) -> str | None:
    from hf_lifecycle.checkpoint.legacy import NUMPY_NAMES
    from hf_lifecycle.checkpoint.torch_file import load_safely

    try:
        load_safely(path, NUMPY_NAMES)
    except DamagedStateError as error:
        return str(error)
    return None
