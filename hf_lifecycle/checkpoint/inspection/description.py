"""What a directory and a checkpoint in it hold, as plain data; torch is not needed and nothing in it is executed.

Promise: whatever lies in the directory, the answer is data or an error of this package. Not promised: that names in it
are fit for a terminal; whoever prints them sees to that (:mod:`hf_lifecycle.views.text`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.listing import older_runs_in
from hf_lifecycle.checkpoint.directory.manifest import Manifest, read_manifest
from hf_lifecycle.checkpoint.directory.store import PARTS, checkpoints_in, hidden_folder, moved_aside, problems_of
from hf_lifecycle.checkpoint.directory.verification import edited_files
from hf_lifecycle.checkpoint.files.additions import KINDS
from hf_lifecycle.checkpoint.files.regular import read_json, walk
from hf_lifecycle.checkpoint.files.safetensors_file import read_header
from hf_lifecycle.checkpoint.files.statefile import TensorInfo, read_structure
from hf_lifecycle.checkpoint.inspection.acceptance import accepted_in
from hf_lifecycle.early_stopping import EarlyStopping
from hf_lifecycle.errors import StateFileError

__all__ = [
    "describe_checkpoint",
    "describe_directory",
    "is_checkpoint",
    "quick_problems",
    "read_trainer_state",
    "timeline",
]

_LEFT_OVERS = ("staging", PARTS, "fetching", "replaced", "removed")


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` looks like one checkpoint, and not like a directory of them."""
    return (path / "lifecycle").is_dir() or (path / "trainer_state.json").exists()


def quick_problems(checkpoint: Path) -> list[str]:
    """What presence and sizes tell to be wrong with a checkpoint; no file's contents are trusted or waited for."""
    try:
        # Invariant: first. Opening a pipe that bears the name of a file would wait for ever.
        found = (path for path in sorted(walk(checkpoint)) if path.exists() and not path.is_file())
        return [f"{path}: not a regular file" for path in found] or problems_of(checkpoint, full=False)
    except (OSError, ArithmeticError) as error:
        return [f"{checkpoint}: cannot be read ({error})"]


def _size(checkpoint: Path) -> int:
    size = 0
    for folder, _, names in os.walk(checkpoint):
        for name in names:
            with suppress(FileNotFoundError):  # a run that trains here removed it
                size += (Path(folder) / name).lstat().st_size
    return size


def read_trainer_state(checkpoint: Path) -> dict[str, Any]:
    """The content of ``trainer_state.json``.

    Raises:
        FileNotFoundError: There is none.
        StateFileError: It is not a trainer state.
    """
    path = checkpoint / "trainer_state.json"
    if path.exists() and not path.is_file():
        raise StateFileError(path, "not a regular file")
    try:
        state = read_json(path)
    except (ValueError, RecursionError) as error:
        raise StateFileError(path, f"not valid JSON ({error})") from error
    if not isinstance(state, dict):
        raise StateFileError(path, "not a trainer state")
    return state


def _manifest(checkpoint: Path) -> Manifest | None:
    try:
        return read_manifest(checkpoint)
    except FileNotFoundError:
        return None


def _row(step: int | None, path: Path) -> dict[str, Any]:
    """One checkpoint in one line; of a damaged one only what its name and size tell."""
    problems = quick_problems(path)
    row: dict[str, Any] = {
        "name": path.name,
        "path": str(path),
        "step": step,
        "epoch": None,
        "metric": None,
        "size": _size(path),
        "created": None,
        "manifest": False,
        "whole": not problems,
        "problems": problems,
        "edited": list(edited_files(path, problems)),
    }
    return row if problems else row | _progress(path)


def _row_if_there(step: int, path: Path) -> dict[str, Any] | None:
    """The row, or None where a run that trains here removed the checkpoint while it was looked at."""
    try:
        row = _row(step, path)
    except FileNotFoundError:
        if path.exists():
            raise
        return None
    return row if path.exists() else None


def _progress(path: Path) -> dict[str, Any]:
    manifest = _manifest(path)
    if manifest is not None:
        metric = manifest.metric
        return {
            "manifest": True,
            "step": manifest.step,
            "epoch": manifest.epoch,
            "created": manifest.created,
            "metric": None if metric is None else {"name": metric.name, "value": metric.value},
        }
    state = read_trainer_state(path)
    best = _number(state.get("best_metric"))
    return {
        "step": _number(state.get("global_step")),
        "epoch": _number(state.get("epoch")),
        "metric": None if best is None else {"name": None, "value": best},
    }


def _number(value: Any) -> float | int | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def describe_directory(directory: Path) -> dict[str, Any]:
    """Every checkpoint in ``directory``, newest first, what was moved aside, and what a kill left behind."""
    found = (_row_if_there(step, path) for step, path in checkpoints_in(directory))
    rows = [row for row in found if row is not None]
    older = older_runs_in(directory)
    rows = [{**row, "older_run": row["name"] in older} for row in rows]
    newest = next((row["name"] for row in rows if row["whole"] and not row["older_run"]), None)
    left = [path for name in _LEFT_OVERS for path in _children(hidden_folder(directory) / name)]
    return {
        "directory": str(directory),
        "newest": newest,
        "checkpoints": rows,
        "damaged": [{"name": path.name, "size": _size(path)} for path in moved_aside(directory)],
        "left_overs": [{"name": str(path.relative_to(directory)), "size": _size(path)} for path in left],
    }


def timeline(directory: Path) -> list[dict[str, Any]]:
    """The run's events, oldest first.

    Raises:
        OSError: The log is there and cannot be read.
    """
    return [
        {"time": event.time.isoformat(), "event": event.event, "facts": dict(event.facts)}
        for event in read_events(directory)
    ]


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def describe_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """Everything there is to see in one checkpoint. What cannot be read is told among its problems."""
    report = _row(None, checkpoint)
    manifest = _manifest(checkpoint) if report["manifest"] else None
    report |= {
        "attempt": None if manifest is None else manifest.attempt,
        "world_size": None if manifest is None else manifest.world_size,
        "files": [
            {"path": path.relative_to(checkpoint).as_posix(), "size": path.lstat().st_size}
            for path in sorted(path for path in checkpoint.rglob("*") if not path.is_dir())
        ],
    }
    report["accepted"] = accepted_in(checkpoint) if report["whole"] else []
    report["weights"] = _weights(checkpoint, report["problems"]) if report["whole"] else None
    report["ranks"] = []
    if report["whole"]:
        for path in sorted((checkpoint / "lifecycle").glob("rank-*.safetensors")):
            try:
                report["ranks"].append({"file": path.name, **_rank(path)})
            except StateFileError as error:
                report["problems"].append(str(error))
    report["whole"] = not report["problems"]
    return report


def _weights(checkpoint: Path, problems: list[str]) -> dict[str, Any] | None:
    tensors, elements, size, dtypes = 0, 0, 0, dict[str, int]()
    paths = sorted(checkpoint.glob("*.safetensors"))
    for path in paths:
        try:
            header = read_header(path)
        except StateFileError as error:
            problems.append(str(error))
            continue
        for tensor in header.values():
            tensors, elements, size = tensors + 1, elements + tensor.elements, size + tensor.size
            dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    if not paths:
        return None
    files = [path.name for path in paths]
    return {"files": files, "tensors": tensors, "elements": elements, "bytes": size, "dtypes": dtypes}


def _rank(path: Path) -> dict[str, Any]:
    """What one rank's state file says of the run, from its structure alone."""
    tree = read_structure(path, kind=KINDS)
    parts = _mapping(tree.get("parts"))
    objects = _mapping(tree.get("objects"))
    stopping = _mapping(parts.get("early_stopping")).get("decision") or _decision_among(objects)
    return {
        "position": _plain(parts.get("position")),
        "rng_sources": sorted(map(str, _mapping(parts.get("randomness")))),
        "early_stopping": _plain(stopping),
        "environment": _plain(tree.get("environment")),
        "arguments": _plain(tree.get("arguments")),
        "data": _plain(tree.get("data")),
        "objects": {str(name): _count_tensors(state) for name, state in objects.items()},
        "proved": {str(name): len(_mapping(group)) for name, group in _mapping(parts.get("weights")).items()},
    }


def _decision_among(objects: Mapping[Any, Any]) -> Any:
    """The state of early stopping, which a loop has among its objects; None where there is none."""
    known = EarlyStopping().state_dict().keys()
    return next((state for state in objects.values() if isinstance(state, Mapping) and state.keys() == known), None)


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _count_tensors(tree: Any) -> int:
    if isinstance(tree, TensorInfo):
        return 1
    if isinstance(tree, Mapping):
        return sum(_count_tensors(value) for value in tree.values())
    return sum(map(_count_tensors, tree)) if isinstance(tree, (list, tuple)) else 0


def _plain(value: Any) -> Any:
    """A value of a tree as JSON has it; what JSON does not have is shown as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, TensorInfo):
        return f"{value.kind} {value.dtype} {list(value.shape)}"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
