"""Whether a checkpoint without a manifest, as stock Trainer saves it, is whole as far as its files can tell.

Trainer writes ``trainer_state.json`` last, so a directory without it was torn. A safetensors file tells its own size
in its header, a ``.pt`` file is a zip archive whose directory lies at its end. That finds what was cut; a flipped byte
cannot be found without digests.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path

__all__ = ["structural_problems"]

_LARGEST_HEADER = 100_000_000  # the bound of the safetensors library
_LARGEST_STATE = 1 << 30


def structural_problems(checkpoint: Path) -> list[str]:
    """What shows that a save was broken off; nothing, if nothing does."""
    state = checkpoint / "trainer_state.json"
    if not state.is_file():
        return [f"{state}: missing, so the save was broken off"]
    return [problem for path in sorted(checkpoint.rglob("*")) for problem in _problems(path)]


def _problems(path: Path) -> Iterator[str]:
    if path.name == "trainer_state.json" and not _is_json(path):
        yield f"{path}: not a whole JSON document"
    elif path.suffix == ".safetensors" and not _is_whole_safetensors(path):
        yield f"{path}: cut off, or not a safetensors file"
    elif path.suffix in (".pt", ".pth", ".bin") and path.is_file() and not zipfile.is_zipfile(path):
        yield f"{path}: cut off, or not a torch archive"


def _is_json(path: Path) -> bool:
    if path.stat().st_size > _LARGEST_STATE:
        return False
    try:
        json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return True


def _is_whole_safetensors(path: Path) -> bool:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_LARGEST_HEADER, size - 8):
            return False
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError, IndexError):
            return False
    return size == 8 + length + max(ends, default=0) and os.access(path, os.R_OK)
