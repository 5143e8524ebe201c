"""Counters and the like that begin anew in a resumed custom loop are named before it trains."""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.values.variables import values_of_program
from tests.field.limits import Limit
from tests.resume.harness import BrokenOff, forget_last_attempt

COUNTED = Limit(
    "counters, lists and dicts in variables of your program, which it does not set as they were at the save",
    "at the resume",
    "maybe not exact: variables of your program have other values than at the save: … (was …, is …)…; if training "
    "depends on them, keep them in an object that you pass as objects=, or use manager.progress",
)


@dataclass
class Steps:
    taken: int = 0


class Loop:
    """Eight batches an epoch, saved after every second step.

    Args:
        folder: Of the checkpoints.
        break_at: The step after which it ends.
        saves: Whether it is saved in the epochs, else at their end.
    """

    def __init__(self, folder: Path, break_at: int, *, saves: bool = True) -> None:
        forget_last_attempt()
        set_seed(3)
        self._break_at, self._saves = break_at, saves
        self.accelerator = Accelerator(cpu=True)
        self.model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(self.model.parameters(), 0.01)
        loader = DataLoader(torch.arange(16.0).reshape(-1, 1), 2, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(self.model, optimizer, loader)
        self.manager = TrainingStateManager(self.accelerator, folder, signals=())
        self.manager.resume()

    def step(self, batch: Any, factor: float = 1.0) -> float:
        loss = self.model(batch).mean()
        self.accelerator.backward(loss * factor)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())

    def done(self) -> None:
        if self._saves and self.manager.progress.step % 2 == 0:
            self.manager.save()
        if self.manager.progress.step == self._break_at:
            self.manager.close()
            raise BrokenOff

    def end_epoch(self) -> None:
        if not self._saves:
            self.manager.save()


Program = Callable[[Loop], None]


def counts(loop: Loop) -> None:
    step, best, seen = 0, float("inf"), []
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            step += 1
            loss = loop.step(batch, 1 / step)
            best = min(best, loss)
            seen.append(best + len(seen))
            loop.done()
        loop.end_epoch()


def counts_in_epoch(loop: Loop) -> None:
    for _ in loop.manager.epochs(3):
        total = 0.0
        for batch in loop.manager.batches(loop.loader):
            total += loop.step(batch, 1 / (1 + abs(total)))
            loop.done()
        loop.end_epoch()


def counts_in_objects(loop: Loop) -> None:
    several, plain = [Steps(), Steps()], SimpleNamespace(taken=0)
    average: dict[str, torch.Tensor] = {"weight": torch.zeros(1, 1)}
    made: Steps | None = None
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            loop.step(batch)
            several[1].taken += 1
            made = Steps(several[1].taken) if made is None else made
            plain.taken += 1
            average["weight"] = average["weight"] * 0.9 + loop.model.weight.detach() * 0.1
            loop.done()


def counts_in_a_function(loop: Loop) -> None:
    def train(epoch: int) -> None:
        kept: torch.Tensor | None = None
        for batch in loop.manager.batches(loop.loader):
            loop.step(batch)
            kept = batch if kept is None or epoch else kept + batch
            loop.done()

    for epoch in loop.manager.epochs(3):
        train(epoch)


def takes_progress(loop: Loop) -> None:
    step = loop.manager.progress.step
    began = time.perf_counter()
    for epoch in loop.manager.epochs(3):
        rate = 0.1 / (1 + epoch)
        for number, batch in loop.manager.enumerate(loop.loader):
            step += 1
            loop.step(batch, rate / (1 + number))
            began = time.perf_counter()
            loop.done()
        loop.end_epoch()
    loop.step(torch.full((1, 1), began))


def adds_up(loop: Loop) -> None:
    losses: list[float] = []
    total, count = 0.0, 0
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            loss = loop.step(batch)
            losses.append(loss)
            total += loss
            count += 1
            loop.done()
    loop.step(torch.full((1, 1), total / count + losses[0]))


def evaluates(loop: Loop) -> None:
    step = 0
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            loop.model.train()
            step += 1
            loop.step(batch, 1 / step)
            loop.done()
        loop.model.eval()


def calls_locals(loop: Loop) -> None:
    step = 0
    settings = locals()
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            step += 1
            loop.step(batch)
            loop.done()
    assert "batch" not in settings


def counts_elsewhere(loop: Loop) -> None:
    torch.count_of_mine, os.environ["STAGE_OF_MINE"] = 0, "0"  # type: ignore[attr-defined]
    for _ in loop.manager.epochs(3):
        for batch in loop.manager.batches(loop.loader):
            torch.count_of_mine += 1  # type: ignore[attr-defined]
            os.environ["STAGE_OF_MINE"] = str(torch.count_of_mine // 2)  # type: ignore[attr-defined]
            os.environ["stage_of_another".upper()] = str(loop.manager.progress.step)  # no code has this name
            loop.step(batch, 1 / torch.count_of_mine)  # type: ignore[attr-defined]
            loop.done()


def resumed(program: Program, folder: Path, caplog: pytest.LogCaptureFixture, *, saves: bool = True) -> str:
    """What is logged after a resume from step 10, or from the first epoch's end."""
    with pytest.raises(BrokenOff):
        program(Loop(folder, 10, saves=saves))
    assert "not exact" not in caplog.text
    loop = Loop(folder, 0, saves=saves)
    program(loop)
    loop.manager.close()
    return caplog.text


@pytest.mark.parametrize(
    ("program", "named"),
    [
        (counts, ["best of counts() (was ", "seen of counts() (was [", ", is [])", "step of counts() (was 10, is 0)"]),
        (counts_in_epoch, ["total of counts_in_epoch() (was "]),
        (
            counts_in_objects,
            ["average of counts_in_objects()", "made of counts_in_objects() (was Steps, is None)", "and 1 more"],
        ),
        (evaluates, ["step of evaluates() (was 10, is 0)"]),
        (counts_in_a_function, ["kept of train() (was tensor, is None)"]),
    ],
)
def test_variables_that_begin_anew_are_named(
    program: Program, named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = resumed(program, tmp_path, caplog)
    COUNTED.require_told(text)
    assert not [one for one in named if one not in text]
    assert text.count("variables of your program") == 1


def test_counters_in_modules_and_in_the_environment_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "count_of_mine", 0, raising=False)  # and removed after the test, as these are
    for name in ("STAGE_OF_MINE", "stage_of_another".upper()):
        monkeypatch.setenv(name, "0")
    text = resumed(counts_elsewhere, tmp_path, caplog)
    COUNTED.require_told(text)
    assert "environment variable STAGE_OF_MINE (was '5', is '0')" in text
    assert "torch.count_of_mine (was 10, is 0)" in text
    assert "stage_of_another".upper() not in text


def test_number_of_a_range_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def program(loop: Loop) -> None:
        for number in range(20):
            if number == 0:
                batches = iter(loop.manager.batches(loop.loader))
            try:
                batch = next(batches)
            except StopIteration:
                batches = iter(loop.manager.batches(loop.loader))
                batch = next(batches)
            loop.step(batch)
            loop.done()

    assert "number of program() (was 9, is 0)" in resumed(program, tmp_path, caplog)


@pytest.mark.parametrize("program", [takes_progress, adds_up, calls_locals])
def test_variables_that_are_set_as_they_were_are_not_named(
    program: Program, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert "variables of your program" not in resumed(program, tmp_path, caplog)


def test_what_an_epoch_begins_with_is_not_named_at_its_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "variables of your program" not in resumed(counts_in_epoch, tmp_path, caplog, saves=False)
    caplog.clear()
    assert "step of counts() (was 8, is 0)" in resumed(counts, tmp_path / "lasting", caplog, saves=False)


def test_nothing_is_kept_alive_by_the_look() -> None:
    def look() -> tuple[list[str], torch.Tensor | None]:
        large = torch.zeros(3)
        found = values_of_program((), None, lambda value: False)
        reference = weakref.ref(large)
        del large  # a program that goes on
        return list(found), reference()

    names, alive = look()
    assert "large of look()" in names
    assert alive is None
