"""Iterators that a custom loop's program goes through beside the manager's, and that begin anew, are named."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from tests.field.limits import Limit
from tests.resume.harness import BrokenOff, forget_last_attempt

ENUMERATE = Limit(
    "Python's `enumerate` around `manager.batches(loader)`, in a loop resumed within an epoch",
    "at the resume",
    "maybe not exact: enumerate() around batches() starts at 0 again after a resume within an epoch: number the "
    'batches with "for number, batch in manager.enumerate(loader)"',
)
ISLICE = Limit(
    "`itertools.islice` around `manager.batches(loader)`, for a fixed number of batches",
    "at the first save",
    "maybe not exact: itertools.islice() around batches() counts from 0 again after a resume within an epoch: number "
    'the batches with "for number, batch in manager.enumerate(loader)", and leave the loop at that number',
)
ZIP = Limit(
    "`zip` of `manager.batches(loader)` with something that is not the manager's",
    "at the first save",
    "maybe not exact: zip() combines batches() with an iterable that starts from its beginning after a resume within "
    'an epoch: number the batches with "for number, batch in manager.enumerate(loader)", and index the other '
    "iterable with that number",
)
CYCLE = Limit(
    "`itertools.cycle` of a loader",
    "at the first save",
    "maybe not exact: itertools.cycle() replays the batches of its first pass, and a resumed run does not have them: "
    'use a generator that does "while True: yield from manager.batches(loader)"',
)
RAW = Limit(
    "a second loader that is iterated directly, in the bodies of the loop",
    "at the first save",
    "maybe not exact: a loader is iterated directly, so its position is not saved, and a resumed run starts it from "
    "its beginning: iterate manager.batches(loader), also with iter() and next()",
)

Batches = Iterator[tuple[torch.Tensor, ...]]
Feed = Callable[[TrainingStateManager, Any, Any], Callable[[], Batches]]


def train(folder: Path, feed: Feed, break_at: int = 0) -> list[float]:
    """Three epochs of what ``feed`` makes of two loaders of eight batches, saved every second step: the weights."""
    forget_last_attempt()
    set_seed(5)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(1, 1)
    rows = torch.arange(16.0).reshape(-1, 1)
    loaders = [DataLoader(rows + first, 2, shuffle=True) for first in (0, 100)]
    model, optimizer, *loaders = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-4), *loaders)
    manager = TrainingStateManager(accelerator, folder, signals=())
    manager.resume()
    weights: list[float] = []
    epoch = feed(manager, *loaders)
    for _ in manager.epochs(3):
        for batches in epoch():
            accelerator.backward(model(torch.cat(batches)).mean())
            optimizer.step()
            optimizer.zero_grad()
            weights.append(model.weight.item())
            if manager.progress.step % 2 == 0:
                manager.save()
            if manager.progress.step == break_at:
                manager.close()
                raise BrokenOff
    manager.close()
    return weights


def by_enumerate(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    def epoch() -> Batches:
        for number, batch in enumerate(manager.batches(first)):
            if number == 5:
                break
            yield (batch,)

    return epoch


def by_islice(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    return lambda: ((batch,) for batch in itertools.islice(manager.batches(first), 5))


def by_zip(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    factors = [torch.full((1, 1), 2.0**number) for number in range(8)]
    return lambda: zip(manager.batches(first), factors, strict=True)


def by_cycle(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    round_and_round = itertools.cycle(second)
    return lambda: ((batch, next(round_and_round)) for batch in manager.batches(first))


def by_iter(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    def epoch() -> Batches:
        other = iter(second)
        for batch in manager.batches(first):
            yield batch, next(other)

    return epoch


def by_the_manager(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    ones = itertools.repeat(torch.ones(1, 1))
    return lambda: zip(manager.batches(first), manager.batches(second), ones, strict=False)


def by_chunks(manager: TrainingStateManager, first: Any, second: Any) -> Callable[[], Batches]:
    def epoch() -> Batches:
        batches = manager.batches(first)
        while chunk := tuple(itertools.islice(batches, 2)):
            yield chunk

    return epoch


@pytest.mark.parametrize(("feed", "limit"), [(by_islice, ISLICE), (by_zip, ZIP), (by_cycle, CYCLE), (by_iter, RAW)])
def test_iterator_that_begins_anew_is_named_at_the_first_save(
    feed: Feed, limit: Limit, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BrokenOff):
        train(tmp_path, feed, break_at=3)
    limit.require_told(caplog.text)


def test_enumerate_is_named_at_the_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(BrokenOff):
        train(tmp_path, by_enumerate, break_at=3)
    assert not caplog.records
    train(tmp_path, by_enumerate)
    ENUMERATE.require_told(caplog.text)


@pytest.mark.parametrize("feed", [by_the_manager, by_chunks])
def test_iterators_that_go_on_are_not_named(feed: Feed, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = train(tmp_path / "whole", feed)
    with pytest.raises(BrokenOff):
        train(tmp_path / "broken", feed, break_at=7)
    assert train(tmp_path / "broken", feed) == whole[6:]
    assert "batches(" not in caplog.text
