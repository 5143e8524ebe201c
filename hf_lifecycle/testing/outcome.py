"""What a training run left behind, as leaves that are compared bit for bit.

Not compared: wall-clock fields of the log (keys ending in ``_runtime`` and ``_per_second``), paths, and what a run
printed.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np
import torch

from hf_lifecycle.state.fingerprint import local_part

__all__ = ["KINDS", "WALL_CLOCK", "Outcome", "compare", "digest", "flatten", "keep", "kind_of", "read"]

WALL_CLOCK = ("_runtime", "_per_second")
# In the order in which a reader wants to hear of them: what is to blame first.
KINDS = ("batches", "weights", "optimizer", "scheduler", "scaler", "rng", "stopping", "progress", "log", "train_loss")
_ORDER = {kind: number for number, kind in enumerate(KINDS)}


def _leaf(value: Any) -> Any:
    """``value`` as something whose ``==`` is equality of bits."""
    if isinstance(value, torch.Tensor):
        plain = local_part(value).detach().cpu().contiguous()
        return ("tensor", str(plain.dtype), tuple(plain.shape), plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(value, np.ndarray):
        return ("array", str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, np.generic):
        return ("numpy", str(value.dtype), value.tobytes())
    if isinstance(value, float):
        return ("float", struct.pack("<d", value))
    return (type(value).__name__, value)


def flatten(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts, lists, tuples and dataclasses, each with where it is."""
    if is_dataclass(tree) and not isinstance(tree, type):
        tree = {entry.name: getattr(tree, entry.name) for entry in fields(tree)}
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flatten(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, (list, tuple)):
        for index, value in enumerate(tree):
            yield from flatten(value, f"{path}[{index}]")
    else:
        yield path, tree


def read(thing: Any) -> Any:
    """The state of an object that has one, what a function returns, or the value itself."""
    if hasattr(thing, "state_dict"):
        return thing.state_dict()
    return thing() if callable(thing) else thing


def keep(tree: Any) -> dict[str, Any]:
    """The leaves of ``tree`` as they are now: tensors continue changing after a training, these do not."""
    return {
        path: local_part(value).detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for path, value in flatten(tree)
    }


def digest(tree: Any) -> str:
    """A digest of everything in ``tree``: of a batch, say."""
    state = hashlib.sha256()
    for path, value in flatten(tree):
        state.update(repr((path, _leaf(value))).encode())
    return state.hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run ended with, and the batches that it saw.

    Attributes:
        started_at: ``global_step`` at which the (last) attempt began.
        parts: Kind of state to its leaves; ``progress`` holds steps, the best metric and its step. None of a run that
            was interrupted.
        log: ``log_history`` less wall-clock fields.
        batches: (optimizer step, micro-batch) to the digest of the batch.
        trail: Optimizer step to the digests taken in it, by kind, in the order in which they come about.
        unused: The global generators that the run left alone: their position is no part of it.
    """

    started_at: int
    parts: dict[str, dict[str, Any]]
    log: list[dict[str, Any]]
    batches: dict[tuple[int, int], str]
    trail: dict[int, dict[str, str]] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()

    @property
    def ended(self) -> bool:
        """Whether the run came to its end."""
        return bool(self.parts)

    @property
    def last_step(self) -> int:
        """The last step of which something was recorded."""
        return max(self.trail, default=0)


def _show(value: Any) -> str:
    return repr(value) if not isinstance(value, (torch.Tensor, np.ndarray)) else f"{tuple(value.shape)}"


def _distance(a: Any, b: Any) -> float:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.numel():
        return float((a.double() - b.double()).abs().max().item())
    return math.nan


def _compare_leaves(kind: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    problems = []
    unequal_keys = sorted(set(ours) ^ set(theirs))
    if unequal_keys:
        problems.append(f"{kind}: only in one of the runs: {', '.join(unequal_keys[:5])} ({len(unequal_keys)} in all)")
    changed = [path for path in ours if path in theirs and _leaf(ours[path]) != _leaf(theirs[path])]
    if not changed:
        return problems
    if kind in ("weights", "optimizer"):
        gaps = [_distance(ours[path], theirs[path]) for path in changed]
        largest = max((gap for gap in gaps if not math.isnan(gap)), default=math.nan)
        problems.append(f"{kind}: {len(changed)} of {len(ours)} differ, by up to {largest:.2e} (first: {changed[0]})")
        return problems
    if kind == "rng":
        return [*problems, f"rng: {', '.join(sorted({path.split('.')[0] for path in changed}))} at another position"]
    shown = "; ".join(f"{path} {_show(ours[path])} became {_show(theirs[path])}" for path in changed[:4])
    return [*problems, f"{kind}: {shown}"]


def _compare_logs(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[str]:
    problems = []
    if len(ours) != len(theirs):
        problems.append(f"log: {len(ours)} rows became {len(theirs)}")
    for index, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        changed = [key for key in sorted(set(a) | set(b)) if _leaf(a.get(key)) != _leaf(b.get(key))]
        if changed == ["train_loss"]:
            problems.append(f"train_loss: of the whole run {a['train_loss']!r} became {b['train_loss']!r}")
        elif changed:
            shown = "; ".join(f"{key} {a.get(key)!r} became {b.get(key)!r}" for key in changed[:4])
            problems.append(f"log: row {index}: {shown}")
    return problems


def compare(uninterrupted: Outcome, resumed: Outcome) -> list[str]:
    """Every difference between two runs, each beginning with its kind (:data:`KINDS`); none when they are bit-equal."""
    problems = []
    seen = [key for key in resumed.batches if key[0] >= resumed.started_at]
    others = [key for key in seen if resumed.batches[key] != uninterrupted.batches.get(key)]
    expected = {key for key in uninterrupted.batches if key[0] >= resumed.started_at}
    if others:
        problems.append(f"batches: {len(others)} of {len(seen)} after the resume differ (first: {min(others)})")
    if expected - set(seen):
        problems.append(f"batches: {len(expected - set(seen))} were not seen (first: {min(expected - set(seen))})")
    for kind, leaves in uninterrupted.parts.items():
        problems += _compare_leaves(kind, leaves, resumed.parts.get(kind, {}))
    problems += _compare_logs(uninterrupted.log, resumed.log)
    return sorted(problems, key=lambda problem: _ORDER.get(kind_of(problem), len(KINDS)))


def kind_of(problem: str) -> str:
    """The kind that a line of :func:`compare` begins with."""
    return problem.split(":", 1)[0]
