"""Passes over loaders in a custom training loop go on after a resume where they were, with the numbers they had."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from tests.field.limits import Limit
from tests.resume.harness import forget_last_attempt

ENUMERATED = Limit(
    "gradients accumulated by hand by the numbers of Python's `enumerate`, in a loop resumed within an epoch",
    "at the resume",
    "not exact: …: since the resume, optimizer steps fall on other batches of the pass than before: …; number the "
    'batches with "for number, batch in manager.enumerate(loader)", whose numbers go on after a resume',
    "a warning",
)

Numbered = Callable[[TrainingStateManager, Any], Iterable[tuple[int, Any]]]
StepsOn = Callable[[int], bool]


def with_python(manager: TrainingStateManager, loader: Any) -> Iterable[tuple[int, Any]]:
    return enumerate(manager.batches(loader))


def with_manager(manager: TrainingStateManager, loader: Any) -> Iterable[tuple[int, Any]]:
    return manager.enumerate(loader)


def accumulated(folder: Path, numbered: Numbered, steps_on: StepsOn, stop: int = 0) -> tuple[float, list[int]]:
    """Two epochs of 12 batches with ``steps_on`` deciding by a batch's number; saved, and left, at step ``stop``.

    Returns:
        The weight, and the numbers within the pass of the batches that had a step.
    """
    forget_last_attempt()
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = DataLoader(torch.arange(22.0).reshape(-1, 1), batch_size=2, shuffle=True)
    manager = TrainingStateManager(accelerator, folder, signals=())
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    manager.resume()
    where = []
    for _ in manager.epochs(2):
        for number, batch in numbered(manager, loader):
            accelerator.backward(model(batch).sin().sum() / 3)
            if steps_on(number):
                optimizer.step()
                optimizer.zero_grad()
                where.append(manager.progress.batch - 1)
                if manager.progress.step == stop:
                    manager.save()
                    manager.close()
                    return model.weight.item(), where
    manager.close()
    return model.weight.item(), where


def every_third(number: int) -> bool:
    return number % 3 == 0


def every_third_and_the_last(number: int) -> bool:
    return number % 3 == 2 or number == 10


@pytest.mark.parametrize("stop", [1, 2, 6])
@pytest.mark.parametrize("steps_on", [every_third, every_third_and_the_last])
def test_numbers_of_the_manager_go_on_after_a_resume(
    steps_on: StepsOn, stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = accumulated(tmp_path / "whole", with_manager, steps_on)
    accumulated(tmp_path / "broken", with_manager, steps_on, stop)
    weight, where = accumulated(tmp_path / "broken", with_manager, steps_on)
    assert (weight, where) == (whole[0], whole[1][stop:])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("steps_on", "stop"),
    # After one step of the run, two, one of the second epoch; and before the last of the second epoch, off the beat.
    [(every_third, 1), (every_third, 2), (every_third, 5), (every_third_and_the_last, 6)],
)
def test_numbers_of_python_that_begin_anew_are_reported(
    steps_on: StepsOn, stop: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = accumulated(tmp_path / "whole", with_python, steps_on)
    accumulated(tmp_path / "broken", with_python, steps_on, stop)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    _, where = accumulated(tmp_path / "broken", with_python, steps_on)
    assert where != whole[1][stop:]
    (told,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    ENUMERATED.require_told(told)


def test_steps_on_every_batch_and_by_accelerate_are_not_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for steps_on in (lambda number: True, lambda number: number % 3 == 2):  # the second begins anew in time
        folder = tmp_path / str(steps_on(0))
        accumulated(folder, with_python, steps_on, 2)
        accumulated(folder, with_python, steps_on)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
