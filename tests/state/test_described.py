"""A value's description is that of the value: the same in another process, another one for another value."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_lifecycle.state.fingerprint import leaf_digests, tree_digest
from hf_lifecycle.state.values.described import described, description_digest

ROOT = Path(__file__).resolve().parents[2]


class Plain:
    """An object without a text of its own."""

    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


@dataclass
class Settings:
    """Settings with a set, whose text has no order of its own."""

    names: Any
    rate: float = 0.1


class Colour(Enum):
    """A choice."""

    RED = "red"


def train(rate: float) -> float:
    """Stands for any function."""
    return rate


def everything() -> dict[Any, Any]:
    """One value of every kind, made afresh."""
    names = {"query", "key", "value", "output", "gate", "up", "down"}
    return {
        "function": train,
        "lambda": lambda: None,
        "class": Plain,
        "method": Plain().__init__,
        "partial": partial(train, rate=2),
        "set": names,
        "of sets": [frozenset(names), {1, 2.5, None}],
        "dataclass": Settings(names),
        "object": Plain(inner=Plain(names=names), call=train),
        "enum": Colour.RED,
        "tensor": torch.arange(4.0, dtype=torch.bfloat16),
        "array": np.arange(3),
        "objects": np.array([Plain(), names], dtype=object),
        "scalar": np.float32(0.1),
        "nan": float("nan"),
        "path": Path("a/b"),
        "dtype": torch.float16,
        "generator": iter([]),
        frozenset(names): 1,
        Plain(names=names): 2,
        3: 3,
    }


def test_another_process_describes_the_same_in_the_same_way() -> None:
    code = "from tests.state.test_described import *; print(description_digest(everything()))"
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == len(description_digest(None))
    assert "0x" not in str(described(everything()))
    assert described(everything()) == described(everything())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (partial(train, rate=1), partial(train, rate=2)),
        (partial(train, 1), train),
        (Plain(a=1), Plain(a=2)),
        (Plain(a={"x", "y"}), Plain(a={"x", "z"})),
        (Settings({"x"}), Settings({"y"})),
        (train, everything),
        (torch.zeros(2000), torch.cat([torch.zeros(1999), torch.ones(1)])),
        (np.zeros(2), np.zeros(2, dtype=np.float32)),
        (Colour.RED, "blue"),
        (float("nan"), 0.0),
        ({"a": 1}, {"a": 1, "b": None}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_another_value_is_described_otherwise(one: Any, other: Any) -> None:
    assert described(one) != described(other)


def test_what_holds_itself_is_described() -> None:
    one = Plain()
    one.myself = one  # type: ignore[attr-defined]
    assert described(one) == described(one)


def test_keys_and_arrays_of_objects_are_digested_by_what_they_are() -> None:
    def state() -> dict[Any, Any]:
        return {frozenset({"a", "b"}): 1, Plain(a=1): 2, "array": np.array([Plain(a=1)], dtype=object), 0: 3}

    assert leaf_digests(state(), "state") == leaf_digests(state(), "state")
    other = {**state(), "array": np.array([Plain(a=2)], dtype=object)}
    assert tree_digest(state()) != tree_digest(other)
