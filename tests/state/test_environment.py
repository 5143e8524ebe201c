"""What a run runs on, and what a difference does to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hf_lifecycle.state.environment import Difference, Grade, capture_environment, compare


def test_an_environment_equals_itself_and_is_plain() -> None:
    here = capture_environment(world_size=1)
    assert compare(here, capture_environment(world_size=1)) == []
    assert json.loads(json.dumps(here)) == here
    assert here["torch"].partition("+")[0] == torch.__version__.partition("+")[0]  # some builds name the device once
    assert here["cpu_threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("name", "value", "grade"),
    [
        ("python", "3.99", Grade.HARMLESS),
        ("host", "another", Grade.HARMLESS),
        ("hf-lifecycle", "9", Grade.HARMLESS),
        ("torch", "9", Grade.BREAKS),
        ("transformers", "9", Grade.BREAKS),
        ("cpu_capability", "ELSE", Grade.BREAKS),
        ("cpu_threads", 999, Grade.BREAKS),
        ("accelerators", ["another"], Grade.BREAKS),
        ("deterministic_algorithms", True, Grade.BREAKS),
        ("world_size", 2, Grade.FATAL),
    ],
)
def test_a_difference_has_the_grade_of_what_it_does(name: str, value: Any, grade: Grade) -> None:
    here = capture_environment(world_size=1)
    assert compare(here | {name: value}, here) == [Difference(name, value, here[name], grade)]


def test_what_only_one_side_has_is_a_difference_in_the_order_of_the_saved() -> None:
    found = compare({"b": 1, "a": 2}, {"c": 3, "a": 0})
    assert [(item.name, item.saved, item.present) for item in found] == [("b", 1, None), ("a", 2, 0), ("c", None, 3)]


def test_names_may_be_left_out_and_graded_otherwise() -> None:
    found = compare({"a": 1, "b": 1}, {}, {"b": Grade.FATAL}, otherwise=Grade.HARMLESS, leave_out=["a"])
    assert [(item.name, item.grade) for item in found] == [("b", Grade.FATAL)]


def test_a_difference_is_told_in_one_line_with_both_values() -> None:
    assert str(Difference("seed", 42, 1, Grade.BREAKS)) == "seed: 42 -> 1 (breaks exactness)"
    long = str(Difference("targets", "x" * 500, None, Grade.HARMLESS))
    assert len(long) < 100
    assert long.endswith("... -> None (harmless)")


def test_a_difference_says_what_makes_it_as_it_was() -> None:
    found = compare(
        {"torch": "2.6.0", "cpu_threads": 8, "peft": None}, {"torch": "2.13.0", "cpu_threads": 4, "peft": "1"}
    )
    assert list(map(str, found)) == [
        "torch: '2.6.0' -> '2.13.0' (breaks exactness: pip install torch==2.6.0)",
        "cpu_threads: 8 -> 4 (breaks exactness: set OMP_NUM_THREADS=8)",
        "peft: None -> '1' (breaks exactness)",
    ]
