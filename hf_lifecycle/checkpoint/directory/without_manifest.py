"""Whether a checkpoint without a manifest, as stock Trainer saves it, is whole as far as its files can tell.

Trainer writes ``trainer_state.json`` last, so a directory without it was torn. A safetensors file tells its own size
in its header, a ``.pt`` file is a zip archive whose directory lies at its end. That finds what was cut; a flipped byte
cannot be found without digests.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Callable
from pathlib import Path

from hf_lifecycle.checkpoint.directory.manifest import files_below
from hf_lifecycle.checkpoint.files.additions import mark_in
from hf_lifecycle.checkpoint.files.regular import open_regular, read_json
from hf_lifecycle.checkpoint.files.safetensors_file import read_header
from hf_lifecycle.errors import StateFileError

__all__ = ["lost_own_files", "may_be_checkpoint", "structural_problems"]

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
