"""Another number of processes: what is converted, and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR

from hf_lifecycle.hosts.accelerate.resume.world_size import change_of


def facts(world: int, rows: int | None, accumulation: int = 1, batch: int | None = None) -> dict[str, Any]:
    place = {"passes": 1, "begun": True, "batch": batch}
    return {
        "environment": {"world_size": world},
        "arguments": {"gradient_accumulation_steps": accumulation},
        "data": {"loader 0": {"rows": rows}},
        "parts": {"position": {"epoch": 1, "step": 8, "loaders": {"loader 0": {"position": place, "order": None}}}},
    }


def change(saved: dict[str, Any], present: dict[str, Any], *schedulers: Any) -> Any:
    return change_of(SimpleNamespace(_schedulers=list(schedulers)), saved, present)


@pytest.mark.parametrize(
    ("saved", "present", "batch"),
    [
        (facts(2, 8, batch=3), facts(4, 8), 3),  # the same rows at once: smaller batches on more ranks
        (facts(2, 8, 2, batch=6), facts(4, 16, 1), 3),  # half the accumulation
        (facts(4, 16, 1, batch=3), facts(1, 4, 4), 12),
        (facts(2, 8), facts(4, 8), None),  # between two passes
        (facts(2, None), facts(4, None), None),
    ],
)
def test_a_place_is_converted(saved: dict[str, Any], present: dict[str, Any], batch: int | None) -> None:
    found = change(saved, present)
    assert found.problems == ()
    assert found.position["loaders"]["loader 0"]["position"] == {"passes": 1, "begun": True, "batch": batch}
    assert (found.position["epoch"], found.position["step"]) == (1, 8)


@pytest.mark.parametrize(
    ("saved", "present", "words"),
    [
        (facts(2, 8, batch=3), facts(3, 12), "took 8 rows (8 at once, 1 times) and would now take 12"),
        (facts(2, 8, 3, batch=1), facts(3, 12, 2), "8 rows were read, which is not a multiple of the batch size 12"),
        (facts(2, None, batch=1), facts(3, None), "the number of rows that all processes take at once is unknown"),
    ],
)
def test_a_place_that_cannot_be_converted_is_refused_by_name(
    saved: dict[str, Any], present: dict[str, Any], words: str
) -> None:
    (problem,) = change(saved, present).problems
    assert problem.startswith("loader 0: ")
    assert words in problem


def test_schedulers_that_each_process_steps_are_converted_or_refused() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    falling = AcceleratedScheduler(LambdaLR(optimizer, lambda step: 1.0 / (1 + step)), optimizer)
    for _ in range(8):
        falling.scheduler.step()
    saved, present = facts(4, 8), facts(2, 8)
    found = change(saved, present, falling)
    assert found.problems == ()
    found.convert_schedulers(SimpleNamespace(_schedulers=[falling]))
    assert (falling.scheduler.last_epoch, optimizer.param_groups[0]["lr"]) == (4, 1.0 / 5)
    assert falling.get_last_lr() == [1.0 / 5]
    cosine = AcceleratedScheduler(CosineAnnealingLR(optimizer, 10), optimizer)
    assert (
        "a CosineAnnealingLR: accelerate steps it once for each process" in change(saved, present, cosine).problems[0]
    )
    by_batch = AcceleratedScheduler(CosineAnnealingLR(optimizer, 10), optimizer, split_batches=True)
    assert change(saved, present, by_batch).problems == ()
