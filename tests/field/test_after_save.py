"""What the body of a custom loop changes below ``save()`` is there after a resume."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import EarlyStopping, TrainingStateManager
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.state.fingerprint import leaf_digests
from tests.field.limits import Limit
from tests.trainer.runs import BrokenOff, Labelled, Net

AGAIN = Limit(
    "a body that changes, below `save()`, what was saved, or that leaves its loop there",
    "at a save",
    "maybe not exact: save() at step … is repeated at the end of the loop's body, since the program changes … after "
    "it; if the process is killed in between, the change is lost: call save() at the end of the loop's body, which "
    "also saves once instead of twice",
)
OWN = Limit(
    "the same below `accelerator.save_state()`, where the program saves by itself",
    "at a save",
    "maybe not exact: the program changes … after accelerator.save_state(), in the same body of the loop, so the "
    "checkpoint does not contain that: call it at the end of the body",
)


LEAVES = Limit(
    "a loop that is left by `break` below `save()`, after a change of what was saved, such as an early stop",
    "at the end",
    "not exact: the program changes … after save() at step … and then leaves the loop, so a run that is resumed from "
    "that checkpoint does not have the change: call save() at the end of the loop's body",
)


class Average:
    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.held = [one.detach().clone() for one in model.parameters()]

    def update(self) -> None:
        for own, one in zip(self.held, self.model.parameters(), strict=True):
            own.lerp_(one.detach(), 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = [one.clone() for one in state["held"]]


class Timer:
    """Its state goes on by itself."""

    def state_dict(self) -> dict[str, Any]:
        return {"now": time.perf_counter()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["now"]


class Factored(Net):
    factor = 1.0

    def forward(self, **batch: Any) -> Any:
        given = super().forward(**batch)
        return {**given, "loss": given["loss"] * self.factor}


class Script:
    """A loop of 12 steps, 4 to an epoch. ``wait``: None to save by ``accelerator.save_state``."""

    def __init__(self, folder: Path, wait: bool | None = True) -> None:
        set_seed(7)
        self.folder, self.wait = folder, wait
        self.accelerator = Accelerator(cpu=True)
        model, second = Factored(), torch.nn.Linear(1, 1)
        optimizer, other = torch.optim.AdamW(model.parameters(), 1e-2), torch.optim.SGD(second.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        loader = DataLoader(Labelled(), 4, shuffle=True)
        self.average, self.stopping = Average(model), EarlyStopping(patience=9)
        objects = {"average": self.average, "stopping": self.stopping, "timer": Timer()}
        self.manager = TrainingStateManager(self.accelerator, folder, objects=objects, signals=())
        self.model, self.second, self.optimizer, self.other, self.scheduler, self.loader = self.accelerator.prepare(
            model, second, optimizer, other, scheduler, loader
        )

    def step(self, batch: Any) -> None:
        self.accelerator.backward(self.model(**batch)["loss"])
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self) -> None:
        if self.wait is None:
            self.accelerator.save_state(str(self.folder / "own"))
        else:
            self.manager.save(wait=self.wait)

    def digests(self) -> dict[str, str]:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"scheduler": self.scheduler.state_dict(), "average": self.average.state_dict()}
        return leaf_digests({**state, "second": self.second.state_dict(), "factor": self.model.factor}, "")


def clamp(script: Script) -> None:
    for one in script.model.parameters():
        one.data.clamp_(-0.1, 0.1)


def freeze(script: Script) -> None:
    next(script.model.parameters()).requires_grad_(script.manager.progress.step % 3 == 0)


def lower(script: Script) -> None:
    script.optimizer.param_groups[0]["lr"] *= 0.9


def count(script: Script) -> None:
    script.model.factor += 0.5


def train_the_second(script: Script) -> None:
    script.accelerator.backward(script.second(torch.ones(1)).sum())
    script.other.step()
    script.other.zero_grad()


Change = Callable[[Script], object]
CHANGES: dict[str, Change] = {
    "scheduler": lambda script: script.scheduler.step(),
    "learning rate": lower,
    "weights": clamp,
    "average": lambda script: script.average.update(),
    "counter": count,
    "frozen": freeze,
    "second optimizer": train_the_second,
    "early stopping": lambda script: script.stopping.step(1.0),
    "best metric": lambda script: script.manager.is_best(1.0 / script.manager.progress.step),
}


def _in_bodies(script: Script, change: Change) -> Iterator[None]:
    for _ in script.manager.epochs(3):
        for batch in script.manager.batches(script.loader):
            script.step(batch)
            if script.manager.progress.step % 2 == 0:
                script.save()
            change(script)
            yield


def _in_epochs(script: Script, change: Change) -> Iterator[None]:
    for _ in script.manager.epochs(3):
        for batch in script.manager.batches(script.loader):
            script.step(batch)
            yield
        script.save()
        change(script)


def _left_by_break(script: Script, change: Change) -> Iterator[None]:
    for _ in script.manager.epochs(4):
        for number, batch in script.manager.enumerate(script.loader):
            script.step(batch)
            yield
            if number == 2:
                script.save()
                change(script)
                break


Loop = Callable[[Script, Change], Iterator[None]]


def _train(folder: Path, loop: Loop, change: Change, *, break_at: int = 0, wait: bool | None = True) -> dict[str, str]:
    script = Script(folder, wait)
    try:
        script.manager.resume()
        for _ in loop(script, change):
            if script.manager.progress.step == break_at:
                raise BrokenOff
        return script.digests()
    finally:
        script.manager.close()


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_body_changes_after_its_save_is_there_after_a_resume(
    change: str, wait: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _train(tmp_path / "whole", _in_bodies, CHANGES[change], wait=wait)
    AGAIN.require_told(caplog.text)
    with pytest.raises(BrokenOff):
        _train(tmp_path / "broken", _in_bodies, CHANGES[change], break_at=7, wait=wait)
    assert _train(tmp_path / "broken", _in_bodies, CHANGES[change], wait=wait) == whole


@pytest.mark.parametrize("loop", [_in_epochs, _left_by_break])
@pytest.mark.parametrize("change", ["scheduler", "weights", "average"])
def test_what_the_rest_of_an_epoch_changes_after_its_save_is_there_after_a_resume(
    loop: Loop, change: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _train(tmp_path / "whole", loop, CHANGES[change])
    AGAIN.require_told(caplog.text)
    with pytest.raises(BrokenOff):
        _train(tmp_path / "broken", loop, CHANGES[change], break_at=7)
    assert _train(tmp_path / "broken", loop, CHANGES[change]) == whole


def test_save_that_is_last_in_its_body_is_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train(tmp_path, _in_bodies, lambda _: torch.rand(3))
    assert not AGAIN.is_told_in(caplog.text)
    assert [one.event for one in read_events(tmp_path)].count("committed") == 6


def test_save_beside_one_of_the_managers_does_not_keep_that_from_being_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def beside(script: Script) -> None:
        if script.manager.progress.step % 2 == 0:
            script.accelerator.save_state(str(script.folder / "own"))
        script.scheduler.step()

    whole = _train(tmp_path / "whole", _in_bodies, beside)
    AGAIN.require_told(caplog.text)
    with pytest.raises(BrokenOff):
        _train(tmp_path / "broken", _in_bodies, beside, break_at=7)
    assert _train(tmp_path / "broken", _in_bodies, beside) == whole


def _stopped_early(script: Script, change: Change) -> Iterator[None]:
    for epoch in script.manager.epochs(3):
        for batch in script.manager.batches(script.loader):
            script.step(batch)
            yield
        script.save()
        change(script)
        if epoch == 1:
            break


@pytest.mark.parametrize("changes", [True, False])
def test_change_below_a_save_after_which_the_loop_is_left_is_named(
    changes: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def stop(script: Script) -> None:
        if script.manager.progress.step == 8 and changes:
            script.stopping.step(1.0)

    _train(tmp_path, _stopped_early, stop)
    assert LEAVES.is_told_in(caplog.text) is changes
    assert not AGAIN.is_told_in(caplog.text)


def test_checkpoint_is_complete_when_save_returns(tmp_path: Path) -> None:
    script = Script(tmp_path)
    batches: Any = script.manager.batches(script.loader)
    script.step(next(batches))
    path = script.manager.save(metric=0.5)
    (path / "notes.txt").write_text("kept")
    before = script.scheduler.scheduler.last_epoch
    script.scheduler.step()
    next(batches)
    batches.close()
    script.manager.close()
    again = Script(tmp_path)
    assert again.manager.resume() == path
    assert again.scheduler.scheduler.last_epoch == before + 1
    assert (path / "notes.txt").read_text() == "kept"
    again.manager.close()


def test_changes_after_a_save_of_the_programs_own_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _train(tmp_path, _in_bodies, CHANGES["scheduler"], wait=None)
    OWN.require_told(caplog.text)
