"""What the files of a checkpoint tell by themselves: which would run code if they were loaded, and which were cut.

Pickles that ``weights_only`` does not take would run code. Looked at are the files by these names, which Trainer and
accelerate unpickle on a resume. Tensors are not read for it. ``training_args.bin`` is a pickle of a class in every
checkpoint of Trainer's; nobody loads it on a resume, and nothing here opens it. Files by other names are the user's
own, and neither Trainer nor this package loads them.

DeepSpeed's files name some classes of its own, and it loads them without asking. Those classes hold numbers and run
nothing; what else such a file names is refused.

A checkpoint without a manifest, as stock Trainer saves it, can be whole as far as its files tell. Trainer writes
``trainer_state.json`` last, so a directory without it was torn. A safetensors file tells its own size in its header, a
``.pt`` file is a zip archive whose directory lies at its end. That finds what was cut; a flipped byte cannot be found
without digests.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.files.additions import mark_in
from hf_lifecycle.checkpoint.files.regular import open_regular, read_json
from hf_lifecycle.checkpoint.files.safetensors_file import read_header
from hf_lifecycle.checkpoint.files.sharded_files import METADATA, reason_to_refuse_shards
from hf_lifecycle.checkpoint.files.structure import DamagedStateError, ForeignStateError
from hf_lifecycle.errors import StateFileError

__all__ = [
    "is_of_an_engine",
    "lost_own_files",
    "may_be_checkpoint",
    "refuse_names",
    "refused_pickles",
    "structural_problems",
]

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


_LARGEST_STATE = 1 << 30
_STATE = "trainer_state.json"
_OF_TRAINER = re.compile(r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth")  # written by a save alone


def may_be_checkpoint(folder: Path) -> bool:
    """Whether a ``checkpoint-N`` is a checkpoint, or what is left of one.

    Not so for what others call by such a name: an export, what ``save_model()`` wrote, notes, a checkpoint of
    another program. A save of stock Trainer's that was killed before it wrote more than intact weights is the same.
    """
    if (folder / "lifecycle").exists() or (folder / _STATE).exists():
        return True
    try:
        return any(_OF_TRAINER.fullmatch(path.name) or (path.is_file() and _problem(path)) for path in folder.iterdir())
    except OSError:
        return True  # it cannot be looked at, which whoever verifies it says


def structural_problems(checkpoint: Path) -> list[str]:
    """What shows that a save was interrupted; nothing, if nothing does."""
    state = checkpoint / _STATE
    if not state.is_file():
        return [f"{state}: missing, so the save was interrupted"]
    try:
        paths = list(files_below(checkpoint))
    except OSError as error:
        return [str(error)]
    found = [problem for path in paths if (problem := _problem(path)) is not None]
    return found or lost_own_files(checkpoint)


def lost_own_files(checkpoint: Path) -> list[str]:
    """What is wrong where ``trainer_state.json`` has the mark of this package, and none of its files is left."""
    folder = checkpoint / "lifecycle"
    try:
        state = read_json(checkpoint / _STATE, _LARGEST_STATE)
    except (OSError, ValueError, RecursionError):
        return []
    mark = mark_in(state.get("stateful_callbacks")) if isinstance(state, dict) else None
    if mark is None or mark.get("step") != state.get("global_step") or any(folder.glob("rank-*.safetensors")):
        return []
    return [f"{folder}: missing, which LifecycleCallback saves"]


def _problem(path: Path) -> str | None:
    """What is wrong with a regular file, as far as its kind is known."""
    check, fault = _CHECKS.get(path.name, _CHECKS.get(path.suffix, (None, "")))
    try:
        return f"{path}: {fault}" if check is not None and not check(path) else None
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"


def _is_json(path: Path) -> bool:
    try:
        read_json(path, _LARGEST_STATE)
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    try:
        read_header(path)
    except StateFileError:
        return False
    return True


def _is_archive(path: Path) -> bool:
    with open_regular(path) as file:
        return zipfile.is_zipfile(file)


_ARCHIVE: tuple[Callable[[Path], bool], str] = (_is_archive, "truncated, or not a torch archive")
_CHECKS: dict[str, tuple[Callable[[Path], bool], str]] = {
    _STATE: (_is_json, "not a complete JSON document"),
    ".safetensors": (_is_whole_safetensors, "truncated, or not a safetensors file"),
    **dict.fromkeys((".pt", ".pth", ".bin"), _ARCHIVE),
}
