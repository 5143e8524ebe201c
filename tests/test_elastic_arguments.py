"""Accumulation that follows the number of processes, or an error that says which numbers fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from transformers import TrainingArguments

from hf_lifecycle import elastic_arguments


def on(processes: int) -> Any:
    """What is read of TrainingArguments, on so many processes."""
    return SimpleNamespace(per_device_train_batch_size=4, train_batch_size=4, world_size=processes)


@pytest.mark.parametrize(("processes", "steps"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_accumulation_makes_up_for_processes(processes: int, steps: int) -> None:
    assert elastic_arguments(on(processes), global_batch_size=32).gradient_accumulation_steps == steps


def test_arguments_and_an_accelerator_are_set_and_returned(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    assert elastic_arguments(args, global_batch_size=32) is args
    assert args.gradient_accumulation_steps == 8
    accelerator = Accelerator(cpu=True)
    assert elastic_arguments(accelerator, global_batch_size=32, batch_size=16) is accelerator
    assert accelerator.gradient_accumulation_steps == 2


def test_what_does_not_divide_is_refused_with_the_sizes_and_processes_that_do() -> None:
    with pytest.raises(ValueError, match="global_batch_size=32: 3 processes with 4 rows each take 12 at once") as error:
        elastic_arguments(on(3), global_batch_size=32)
    assert "use 24 or 36, or 1, 2, 4, 8 processes" in str(error.value)
    with pytest.raises(ValueError, match=r"use 4$"):
        elastic_arguments(on(1), global_batch_size=3)


@pytest.mark.parametrize(
    ("target", "given", "message"),
    [
        (on(2), {"global_batch_size": 0}, "global_batch_size must be a whole number >= 1"),
        (on(2), {"global_batch_size": 32, "batch_size": 4}, "per_device_train_batch_size"),
        ({}, {"global_batch_size": 32}, "TrainingArguments or an Accelerator"),
        (SimpleNamespace(gradient_accumulation_steps=1, num_processes=2), {"global_batch_size": 8}, "give it"),
    ],
)
def test_arguments_without_meaning_are_refused(target: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        elastic_arguments(target, **given)
