"""Which files of a checkpoint people read and edit: texts that can still be read. Never tensors, never a state.

A change in one of them is more likely a person's than a disk's, and what it says can be looked at. Whether to resume
from such a checkpoint is for a person to say (:mod:`hf_lifecycle.checkpoint.inspection.acceptance`).

Not known: whether a text that was cut is what its writer meant.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from hf_lifecycle.checkpoint.files.regular import read_bounded

__all__ = ["is_readable", "read_json"]

_TEXTS = frozenset({".txt", ".md", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".ini", ".csv", ".tsv", ".jsonl", ".py"})
_OF_TENSORS = ".index.json"  # says which file a tensor lies in
_OBJECTS = frozenset({"trainer_state.json", "config.json", "generation_config.json", "adapter_config.json"})


def is_readable(checkpoint: Path, name: str) -> bool:
    """Whether the file ``name`` of a checkpoint is a text that people edit, and can be read: JSON parses."""
    path = PurePosixPath(name)
    if path.parts[0] == "lifecycle" or name.endswith(_OF_TENSORS) or path.suffix not in _TEXTS | {".json"}:
        return False
    try:
        if path.suffix != ".json":
            text = read_bounded(checkpoint / name).decode()
            return bool(text.strip()) and "\0" not in text
        return isinstance(read_json(checkpoint / name), dict) or path.name not in _OBJECTS
    except (OSError, ValueError, RecursionError):
        return False


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no JSON, or very large.
        RecursionError: It is nested too deep.
    """
    return json.loads(read_bounded(path))
