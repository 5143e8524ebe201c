"""A script under Trainer is held against itself: what is exact is reported, what is not is named with its step."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, set_seed

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.testing import NotExact, assert_resumes_exactly
from tests.trainer.runs import Net, Rows, new_trainer

LIVE = itertools.count()  # at module level: goes on from run to run


def tiny(output_dir: str, **how: Any) -> Trainer:
    """6 steps, 4 to an epoch, a save every 2."""
    return new_trainer(Path(output_dir), LifecycleCallback(), **how)


def test_exact_run_is_reported_with_what_was_compared(tmp_path: Path) -> None:
    before = random.getstate()
    report = assert_resumes_exactly(tiny, break_at=[3, (2, 5)], directory=tmp_path)
    assert random.getstate() == before
    assert [(run.broken_at, run.resumed_at) for run in report.resumed] == [((3,), (2,)), ((2, 5), (2, 4))]
    assert report.steps == 6
    assert report.compared["batches"] == 6
    assert report.compared["weights"] == 4
    assert report.compared["log rows"] == 4
    text = str(report)
    assert text.startswith("exact: a run of 6 steps, uninterrupted twice and interrupted 2 times")
    assert "interrupted after step 2, 5, resumed at step 2, 4" in text
    assert "compared bit for bit: 6 batches, 4 weights" in text


class Counting(Rows):
    """Each item has in it how many were read before."""

    def __init__(self) -> None:
        super().__init__()
        self.read = 0

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return {**super().__getitem__(index), "x": self.x[index] + self.read}


class Numbered(Rows):
    """Each item has a number of an iterator at module level."""

    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "x": self.x[index] + next(LIVE)}


class Restless(Net):
    """A kernel that is not deterministic."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        return super().forward(x + os.urandom(1)[0] / 1000, labels)


def counted(number: int) -> Iterator[int]:
    """Counts in its frame, where nothing can put a number back."""
    while True:
        yield number
        number += 1


class Remembering(Net):
    """The loss grows with every call, by a count that is nowhere to be found."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = counted(2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        found = super().forward(x, labels)
        return {**found, "loss": found["loss"] * (next(self.calls) if self.training else 1)}


class Counts(Trainer):
    """Sets an option of the optimizer by a count that is nowhere to be found."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.steps = counted(0)

    def training_step(self, *given: Any, **named: Any) -> Any:
        loss, steps = super().training_step(*given, **named), next(self.steps)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = steps
        return loss


def seeded_by_the_clock(output_dir: str) -> Trainer:
    set_seed(time.time_ns() % 2**32)
    return tiny(output_dir, model=Net())


class Noisy(Rows):
    """Each item with other noise at each time."""

    def __getitem__(self, index: int) -> Any:
        return {**super().__getitem__(index), "x": self.x[index] + torch.rand(1)}


def stock(output_dir: str) -> Trainer:
    trainer = tiny(output_dir, train=Noisy())
    trainer.remove_callback(LifecycleCallback)
    return trainer


WRONG = {
    # what is wrong: (make_trainer, in which run, what differs first, since which step, a word of its cause)
    "a dataset that counts": (lambda at: tiny(at, train=Counting()), "interrupted", "batches", 3, "a counter"),
    "an iterator at module level": (lambda at: tiny(at, train=Numbered()), "second", "batches", 1, "module level"),
    "a seed from the clock": (seeded_by_the_clock, "second", "weights at the start", 0, "from the clock"),
    "a kernel": (lambda at: tiny(at, model=Restless()), "second", "weights at the start", 0, "set_seed"),
    "a seeded model with a kernel": (
        lambda at: (set_seed(1), tiny(at, model=Restless()))[1],
        "second",
        "loss",
        1,
        "use_deterministic_algorithms",
    ),
    "a model that counts": (
        lambda at: (set_seed(1), tiny(at, model=Remembering()))[1],
        "interrupted",
        "loss",
        3,
        "buffer",
    ),
    "a trainer that counts": (lambda at: tiny(at, kind=Counts), "interrupted", "weights", 3, "objects="),
    "no callback": (stock, "interrupted", "RNG states", 3, "no LifecycleCallback"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_differs_first_is_named_with_its_step_and_usual_cause(name: str, tmp_path: Path) -> None:
    make_trainer, run, kind, since, cause = WRONG[name]
    with pytest.raises(NotExact) as caught:
        assert_resumes_exactly(make_trainer, break_at=[3])
    error = caught.value
    assert (error.kind, error.since) == (kind, since), str(error)
    assert run in error.run
    assert cause in str(error)
    assert error.problems


@pytest.mark.parametrize(
    ("break_at", "says"),
    [
        ([], "at least one step"),
        ([0], "steps must start at 1 or later,"),
        ([(4, 2)], "steps must start at 1 or later, and grow"),
        ([1], "nothing was saved before"),
        ([7], "the run has only 6 steps"),
    ],
)
def test_breaks_that_prove_nothing_are_refused(break_at: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        assert_resumes_exactly(tiny, break_at=break_at)


def test_trainer_that_writes_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make_trainer: output_dir is"):
        assert_resumes_exactly(lambda at: tiny(str(tmp_path)), break_at=[3])
