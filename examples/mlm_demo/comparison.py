"""Compare the final states of two runs, bit for bit.

Tensors are compared by their bytes, numbers by their bits; nothing is "close". Wall-clock fields of the log are
left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CLOCK_FIELDS = ("_runtime", "_per_second")


@dataclass(frozen=True, slots=True)
class Finding:
    """One row of the table: what was compared, whether it is identical, and the words to show."""

    subject: str
    identical: bool
    words: str


def load_end(path: Path) -> dict[str, Any]:
    """Read what ``train.record_end`` wrote."""
    end: dict[str, Any] = torch.load(path, weights_only=True)
    return end


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value in nested dicts and lists, with its path."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}/{index}")
    else:
        yield path, tree


def same_bits(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        # Bytes, since NaN != NaN and 0.0 == -0.0.
        return torch.equal(
            one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8)
        )
    if isinstance(one, float) and isinstance(other, float):
        return one.hex() == other.hex()
    return type(one) is type(other) and bool(one == other)


def differing(one: Any, other: Any) -> list[str]:
    """The paths at which two trees differ, those that only one of them has among them."""
    left, right = dict(leaves(one)), dict(leaves(other))
    both = [path for path in left if path in right]
    return [path for path in both if not same_bits(left[path], right[path])] + sorted(left.keys() ^ right.keys())


def largest_difference(one: Any, other: Any) -> float:
    """The largest absolute difference between two trees' floating-point tensors of the same shape."""
    left, right = dict(leaves(one)), dict(leaves(other))
    largest = 0.0
    for path in left.keys() & right.keys():
        a, b = left[path], right[path]
        if isinstance(a, torch.Tensor) and a.is_floating_point() and a.numel() and a.shape == b.shape:
            largest = max(largest, (a.double() - b.double()).abs().max().item())
    return largest


def compare_tensors(subject: str, one: Any, other: Any, noun: str = "tensors") -> Finding:
    paths = differing(one, other)
    if noun == "tensors":
        count = sum(isinstance(value, torch.Tensor) for _, value in leaves(one))
    else:
        count = len(list(leaves(one)))
    if not paths:
        return Finding(subject, True, f"identical ({count} {noun})")
    distance = largest_difference(one, other)
    by = f" (by {distance:.0e})" if distance else ""
    return Finding(subject, False, f"{len(paths)} of {count} DIFFER{by}")


def without_clock(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith(CLOCK_FIELDS)} for row in rows]


def compare_logs(one: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> Finding:
    left, right = without_clock(one), without_clock(other)
    rows = max(len(left), len(right))
    different = abs(len(left) - len(right)) + sum(bool(differing(a, b)) for a, b in zip(left, right, strict=False))
    if not different:
        return Finding("log", True, f"identical ({rows} rows)")
    return Finding("log", False, f"{different} of {rows} rows DIFFER")


def compare_stopping(one: Mapping[str, Any], other: Mapping[str, Any]) -> Finding:
    steps = one["stopped at step"], other["stopped at step"]
    if not differing(one, other):
        return Finding("early stopping", True, f"identical (step {steps[0]})")
    if steps[0] != steps[1]:
        return Finding("early stopping", False, f"DIFFERENT (step {steps[1]}, not {steps[0]})")
    return Finding("early stopping", False, f"DIFFERENT ({differing(one, other)[0][1:]})")


def compare_ends(uninterrupted: Mapping[str, Any], broken: Mapping[str, Any]) -> list[Finding]:
    """Compare the final states of two runs; ``uninterrupted`` is the reference."""
    return [
        compare_tensors("weights", uninterrupted["weights"], broken["weights"]),
        compare_tensors("optimizer", uninterrupted["optimizer"], broken["optimizer"]),
        compare_tensors("scheduler", uninterrupted["scheduler"], broken["scheduler"], "values"),
        compare_tensors("RNG states", uninterrupted["rng"], broken["rng"], "states"),
        compare_logs(uninterrupted["log"], broken["log"]),
        compare_stopping(uninterrupted["stopping"], broken["stopping"]),
    ]
