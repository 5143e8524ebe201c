"""What optimizers and schedules are made with is called as the arguments of their constructors are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, SequentialLR, StepLR

from hf_lifecycle.engine.made_with import constructed_with, settings_of, settings_of_schedule, unlike_settings


def _one_cycle(**given: Any) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    return optimizer, OneCycleLR(optimizer, **{"max_lr": 0.1, "total_steps": 10, **given})


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, {}),
        ({"pct_start": 0.5}, {"pct_start of schedule": (0.3, 0.5)}),
        ({"three_phase": True}, {"three_phase of schedule": (False, True)}),
        ({"anneal_strategy": "linear"}, {"anneal_strategy of schedule": ("cos", "linear")}),
        ({"total_steps": 20}, {"total_steps of schedule": (10, 20)}),
        ({"max_lr": 0.2}, {"lr of optimizer": (0.004, 0.008), "max_lr of optimizer": (0.1, 0.2)}),
        ({"div_factor": 10.0}, {"lr of optimizer": (0.004, 0.01), "div_factor of optimizer": (25.0, 10.0)}),
        ({"final_div_factor": 10.0}, {"final_div_factor of optimizer": (1e4, 10.0)}),
    ],
)
@pytest.mark.parametrize("is_as_made", [True, False])
def test_one_cycle_is_told_by_its_arguments(given: dict[str, Any], told: dict[str, Any], is_as_made: bool) -> None:
    def settings(made: tuple[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        optimizer, schedule = made
        both = settings_of(optimizer.param_groups), settings_of_schedule(schedule)
        if is_as_made:
            return both
        return constructed_with(optimizer, both[0], [schedule]), constructed_with(schedule, both[1], [schedule])

    (was, was_schedule), (now, now_schedule) = settings(_one_cycle()), settings(_one_cycle(**given))
    undone, other = unlike_settings(was, now, was, "optimizer")
    more, others = unlike_settings(was_schedule, now_schedule, was_schedule, "schedule")
    assert (other, others) == ([], [])
    if not is_as_made:
        told = {name: both for name, both in told.items() if name != "lr of optimizer"}  # which the schedule has set
    assert {one.name: (one.saved, one.present) for one in undone + more} == told


def test_milestones_of_schedules_that_follow_on_each_other_are_called_so() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    both = SequentialLR(optimizer, [StepLR(optimizer, 2), StepLR(optimizer, 3)], milestones=[4])
    settings = constructed_with(both, settings_of_schedule(both), [both])
    assert settings == {
        "milestones": [4],
        **{f"schedulers[{n}].step_size": 2 + n for n in (0, 1)},
        **{f"schedulers[{n}].gamma": 0.1 for n in (0, 1)},
    }
