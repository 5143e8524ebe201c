"""What a program puts on objects of libraries, and what their states leave out, goes on after a resume of a loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from hf_lifecycle.state.values.marks import Clocks
from tests.resume.harness import forget_last_attempt
from tests.trainer.runs import BrokenOff, Labelled, Net


class Inverse(LRScheduler):
    """Its state is in no ``state_dict()``."""

    def step(self, *_: Any) -> None:
        self.taken = getattr(self, "taken", 0) + 1
        for group in self.optimizer.param_groups:
            group["lr"] = 1e-2 / self.taken

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


class Closed:
    """A schedule whose count is in a closure."""

    def __init__(self, optimizer: Any) -> None:
        self.step = _counting(optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def _counting(optimizer: Any) -> Callable[[], None]:
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        optimizer.param_groups[0]["lr"] = 1e-2 / taken

    return step


KindOfFunctions = type(lambda: None)  # a class whose ``__code__`` is none, in a module of the user's


class Script:
    def __init__(self, folder: Path) -> None:
        forget_last_attempt()
        set_seed(7)
        self.accelerator = Accelerator(cpu=True)
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        self.own = DataLoader(Labelled(), 4, shuffle=True)
        self.closed = Closed(optimizer)
        prepared = self.accelerator.prepare(model, optimizer, Inverse(optimizer), self.own)
        self.model, self.optimizer, self.scheduler, self.loader = prepared
        self.manager = TrainingStateManager(self.accelerator, folder, objects={"closed": self.closed}, signals=())

    def step(self, batch: Any, factor: float) -> None:
        self.accelerator.backward(self.model(**batch)["loss"] * factor)
        self.optimizer.step()
        self.optimizer.zero_grad()


Factor = Callable[[Script], float]


def _of_private(holder: Callable[[Script], Any]) -> Factor:
    def factor(script: Script) -> float:
        one = holder(script)
        setattr(one, "_own", getattr(one, "_own", 1.0) * 0.8)  # noqa: B010
        one._other = getattr(one, "_other", 1.0) * 0.8
        return float(one._own * one._other)

    return factor


def _of(holder: Callable[[Script], Any]) -> Factor:
    def factor(script: Script) -> float:
        one = holder(script)
        one.emphasis = getattr(one, "emphasis", 1.0) * 0.8
        return float(one.emphasis)

    return factor


def _defaults(script: Script) -> float:
    defaults = script.optimizer.optimizer.defaults
    defaults["lr"] *= 0.8
    return float(defaults["lr"])


def _scheduled(script: Script) -> float:
    script.scheduler.scheduler.step()
    return 1.0


def _closed(script: Script) -> float:
    script.closed.step()
    return 1.0


FACTORS: dict[str, Factor] = {
    "optimizer": _of(lambda script: script.optimizer.optimizer),
    "prepared optimizer": _of(lambda script: script.optimizer),
    "parameter": _of(lambda script: next(script.model.parameters())),
    "accelerator": _of(lambda script: script.accelerator),
    "optimizer, privately": _of_private(lambda script: script.optimizer.optimizer),
    "prepared optimizer, privately": _of_private(lambda script: script.optimizer),
    "prepared scheduler, privately": _of_private(lambda script: script.scheduler),
    "parameter, privately": _of_private(lambda script: next(script.model.parameters())),
    "accelerator, privately": _of_private(lambda script: script.accelerator),
    "accelerator's state": _of(lambda script: script.accelerator.state),
    "accelerator's gradient state": _of(lambda script: script.accelerator.gradient_state),
    "loader": _of(lambda script: script.loader),
    "defaults": _defaults,
    "scheduler without a state": _scheduled,
    "object without a state": _closed,
}


def _train(
    folder: Path,
    factor: Factor,
    loader_of: Callable[[Script], Any] = lambda script: script.loader,
    *,
    break_at: int = 0,
) -> dict[str, str]:
    """12 steps, 4 to an epoch, saved every 3."""
    script = Script(folder)
    try:
        script.manager.resume()
        for _ in script.manager.epochs(3):
            for batch in script.manager.batches(loader_of(script)):
                script.step(batch, factor(script))
                step = script.manager.progress.step
                if step % 3 == 0:
                    script.manager.save()
                if step == break_at:
                    raise BrokenOff
        return {name: tensor_digest(one) for name, one in module_tensors(script.model).items()}
    finally:
        script.manager.close()


@pytest.mark.parametrize("kept", FACTORS)
def test_what_is_put_on_an_object_goes_on(kept: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = _train(tmp_path / "whole", FACTORS[kept])
    with pytest.raises(BrokenOff):
        _train(tmp_path / "broken", FACTORS[kept], break_at=5)
    assert _train(tmp_path / "broken", FACTORS[kept]) == whole
    assert "not exact" not in caplog.text


def _of_a_new_generator(folder: Path, *, break_at: int = 0) -> None:
    script = Script(folder)
    script.manager.resume()
    generator = torch.Generator().manual_seed(0)
    for epoch in script.manager.epochs(2):
        for number, batch in script.manager.enumerate(script.loader):
            if number % 3 == 0:
                generator = torch.Generator().manual_seed(10 * epoch + number + 1)
            script.step(batch, float(torch.rand((), generator=generator)))
            if script.manager.progress.step == break_at:
                script.manager.save()
                script.manager.close()
                return
    script.manager.close()


def test_generator_that_is_made_every_few_batches_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _of_a_new_generator(tmp_path, break_at=5)
    _of_a_new_generator(tmp_path)
    assert "generator of _of_a_new_generator() (Generator with other values)" in caplog.text


def _prepared_anew(script: Script) -> Any:
    script.accelerator._dataloaders.clear()
    return script.accelerator.prepare(script.own)


def test_loader_that_is_prepared_anew_in_each_epoch_goes_on(tmp_path: Path) -> None:
    whole = _train(tmp_path / "whole", lambda _: 1.0, _prepared_anew)
    with pytest.raises(BrokenOff):
        _train(tmp_path / "broken", lambda _: 1.0, _prepared_anew, break_at=7)
    assert _train(tmp_path / "broken", lambda _: 1.0, _prepared_anew) == whole


@pytest.mark.parametrize("value", [2.0, 0.25, 127.5, 1e6])
def test_number_of_few_digits_is_not_taken_for_the_reading_of_a_clock(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clocks = Clocks()
    assert clocks.gave(time.perf_counter())
    monkeypatch.setattr(clocks, "_began", tuple(-1.0 for _ in clocks._began))
    assert not clocks.gave(value)
