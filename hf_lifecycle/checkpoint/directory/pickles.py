"""Which files of a checkpoint would run code if they were loaded: pickles that ``weights_only`` does not take.

Looked at are the files by these names, which Trainer and accelerate unpickle on a resume. Tensors are not read for it.
``training_args.bin`` is a pickle of a class in every checkpoint of Trainer's; nobody loads it on a resume, and nothing
here opens it. Files by other names are the user's own, and neither Trainer nor this package loads them.

DeepSpeed's files name some classes of its own, and it loads them without asking. Those classes hold numbers and run
nothing; what else such a file names is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.files.sharded_files import METADATA, reason_to_refuse_shards
from hf_lifecycle.checkpoint.files.structure import DamagedStateError, ForeignStateError

__all__ = ["is_of_an_engine", "refuse_names", "refused_pickles"]

# torch is imported when there is something to look at.


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
_ENGINE_FILES = ("*_model_states.pt", "*_optim_states.pt")  # DeepSpeed's
_ENGINE_NAMES = frozenset(
    {
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    }
)


def refused_pickles(checkpoint: Path) -> list[str]:
    """What is wrong with the pickles of ``checkpoint``, file by file; nothing, if loading them can run nothing.

    Raises:
        OSError: A file cannot be read.
    """
    looks: tuple[tuple[Sequence[str], Callable[[Path], str | None]], ...] = (
        ((*_LOADED, *_ENGINE_FILES), _reason_to_refuse),
        (METADATA, reason_to_refuse_shards),
    )
    return [
        f"{path}: {reason}"
        for path in files_below(checkpoint)
        for patterns, look in looks
        if any(fnmatch(path.name, pattern) for pattern in patterns) and (reason := look(path)) is not None
    ]


def is_of_an_engine(file: str) -> bool:
    """Whether it is one of DeepSpeed's files, by its name."""
    return any(fnmatch(file, pattern) for pattern in _ENGINE_FILES)


def refuse_names(path: Path) -> None:
    """Raise ``DamagedStateError`` if a file of ``torch.save`` is torn, or names what could run code.

    NumPy's names are admitted, and DeepSpeed's own classes in its files.
    """
    import torch

    from hf_lifecycle.checkpoint.files.legacy import NUMPY_NAMES

    try:
        with torch.serialization.safe_globals(NUMPY_NAMES):
            named = set(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except pickle.UnpicklingError as error:  # of an opcode that torch itself never writes
        raise ForeignStateError(f"not in the form that torch.save writes ({error}), so it was not loaded") from error
    except (ValueError, EOFError, RuntimeError, KeyError, AssertionError, UnicodeDecodeError) as error:
        raise DamagedStateError(f"not a complete file of torch.save ({error})") from error
    if is_of_an_engine(path.name):
        named -= _ENGINE_NAMES
    if named:
        raise ForeignStateError(f"it names {', '.join(sorted(named))}, which could run code, so it was not loaded")


def _reason_to_refuse(path: Path) -> str | None:
    from hf_lifecycle.checkpoint.files.legacy import NUMPY_NAMES
    from hf_lifecycle.checkpoint.files.torch_file import load_safely

    try:
        if is_of_an_engine(path.name):
            refuse_names(path)
        else:
            load_safely(path, NUMPY_NAMES)
    except DamagedStateError as error:
        return str(error)
    return None
