"""State that a user's code keeps under the keys of one process, or in memory that others share, goes on in the next."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.accelerator.tiny import Script, new_script
from tests.field.limits import Limit
from tests.trainer.runs import new_trainer, require_same_end

KEPT_BY_ADDRESS = Limit(
    "an optimizer that keeps a state in its `param_groups`, by the `id()` or the address of parameters",
    "at the first save",
    "not exact: optimizer.param_groups[0]['kept'] is kept by the id() or the address of parameters, which are others "
    "in a resumed run: keep it by the parameters themselves, or in optimizer.state",
)
KEYS: dict[str, Callable[[torch.Tensor], Any]] = {
    "parameter": lambda one: one,
    "id": id,
    "address": torch.Tensor.data_ptr,
}


class Momentum(torch.optim.Optimizer):
    """Keeps its state in a dictionary of its own, and the parameters that it has seen twice in a set."""

    def __init__(self, parameters: Any, key: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(parameters, {"lr": 0.01})
        self.key = key
        self.kept: dict[Any, torch.Tensor] = {}
        self.twice: set[Any] = set()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for one in (one for group in self.param_groups for one in group["params"] if one.grad is not None):
            key = self.key(one)
            self.twice |= {key} if key in self.kept else set()
            self.kept.setdefault(key, torch.zeros_like(one)).mul_(0.9).add_(one.grad)
            one.sub_(self.kept[key] * (0.01 if key in self.twice else 0.02))


class ByGroup(Momentum):
    """Keeps it in its groups, which a host saves and loads."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            kept = group.setdefault("kept", {})
            for one in (one for one in group["params"] if one.grad is not None):
                kept[self.key(one)] = average = 0.9 * kept.get(self.key(one), torch.zeros_like(one)) + one.grad
                one.sub_(average * 0.01)


class Curvature:
    """A hook on each layer that keeps an average by the layer, as second-order optimizers do."""

    def __init__(self, model: Any) -> None:
        self.average: dict[Any, torch.Tensor] = {}
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(self.seen)

    def seen(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        average = self.average.setdefault(module, torch.zeros(()))
        average.mul_(0.9).add_(output.detach().abs().mean(), alpha=0.1)
        return output * (1 + average)


@pytest.mark.parametrize("key", KEYS)
def test_optimizer_with_a_dictionary_of_its_own_goes_on(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"optimizer_cls_and_kwargs": (Momentum, {"key": KEYS[key]})}
    require_same_end(
        lambda name: new_trainer(tmp_path / name, LifecycleCallback(), max_steps=8, with_trainer=given), step=5
    )
    assert "not exact" not in caplog.text


@pytest.mark.parametrize("background", [True, False])
def test_optimizer_with_a_dictionary_in_its_groups_goes_on(
    background: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"optimizer_cls_and_kwargs": (ByGroup, {"key": KEYS["parameter"]})}

    def make(name: str) -> Trainer:
        callback = LifecycleCallback(async_save=background)
        return new_trainer(tmp_path / name, callback, max_steps=8, with_trainer=given)

    require_same_end(make, step=5)
    assert "not exact" not in caplog.text
    assert caplog.text.count("the optimizer's state holds a dict by tensor") == 3 * background


@pytest.mark.parametrize("key", ["id", "address"])
def test_optimizer_with_a_dictionary_by_address_in_its_groups_is_told(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = {"optimizer_cls_and_kwargs": (ByGroup, {"key": KEYS[key]})}
    new_trainer(tmp_path, LifecycleCallback(), with_trainer=given).train()
    KEPT_BY_ADDRESS.require_told(caplog.text)
    assert caplog.text.count("optimizer.param_groups[0]['kept'] is kept by the id()") == 1


def test_optimizer_of_a_loop_with_a_dictionary_in_its_groups_goes_on(tmp_path: Path) -> None:
    def make(name: str) -> Script:
        given = {"optimizer_of": lambda model: ByGroup(model.parameters(), KEYS["parameter"])}
        script = new_script(tmp_path / name, generators=7, **given)
        script.manager.resume()
        return script

    whole = make("whole").run(save_at=range(13))
    broken = make("broken").run(save_at=range(13), stop_at=8)
    broken.manager.close()
    assert make("broken").run().digests() == whole.digests()


@pytest.mark.parametrize("key", KEYS)
def test_state_of_a_loop_under_parameters_and_layers_goes_on(
    key: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def make(name: str) -> Script:
        script = new_script(
            tmp_path / name, generators=7, optimizer_of=lambda model: Momentum(model.parameters(), KEYS[key])
        )
        Curvature(script.model)
        script.manager.resume()
        return script

    whole = make("whole").run(save_at=range(13))
    broken = make("broken").run(save_at=range(13), stop_at=8)
    broken.manager.close()
    resumed = make("broken").run()
    assert broken is not resumed  # which lives, so that nothing of the resumed run has the addresses of before
    assert resumed.digests() == whole.digests()
    assert "not exact" not in caplog.text


class Shared(TrainerCallback):
    """Counts in memory that it shares with others."""

    def __init__(self, kind: str) -> None:
        self.memory = bytearray(1)
        made = {
            "value": lambda: multiprocessing.Value("i", 0),
            "array": lambda: multiprocessing.Array("d", 2),
            "ctypes": lambda: ctypes.c_int(0),
            "memoryview": lambda: memoryview(self.memory),
        }
        self.count = made[kind]()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if isinstance(self.count, memoryview) or hasattr(self.count, "__getitem__"):
            self.count[0] += 1
            now = self.count[0]
        else:
            self.count.value += 1
            now = self.count.value
        with torch.no_grad():
            next(model.parameters()).mul_(1 + now / 100)


@pytest.mark.parametrize("kind", ["value", "array", "ctypes", "memoryview"])
def test_number_in_shared_memory_goes_on(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    require_same_end(lambda name: new_trainer(tmp_path / name, Shared(kind), LifecycleCallback(), max_steps=8), step=5)
    assert "not exact" not in caplog.text


def counted() -> int:
    counted.calls = getattr(counted, "calls", 0) + 1  # type: ignore[attr-defined]
    return int(counted.calls)  # type: ignore[attr-defined]


class Counting(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        with torch.no_grad():
            next(model.parameters()).mul_(1 + counted() / 100)


def test_attribute_that_a_function_gets_at_its_first_call_goes_on(tmp_path: Path) -> None:
    def make(name: str) -> Trainer:
        vars(counted).clear()
        return new_trainer(tmp_path / name, Counting(), LifecycleCallback(), max_steps=8)

    require_same_end(make, step=5)
    assert "calls" not in globals()
