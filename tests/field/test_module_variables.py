"""What a script keeps in variables of its module, in defaults and in classes goes on, as what its objects keep does."""

from __future__ import annotations

import importlib.util
import random
import runpy
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.data.generators import find_generators
from hf_lifecycle.libraries import is_of_user
from hf_lifecycle.state.values.functions import variables_of
from tests.trainer.runs import Net, Rows, break_off, digests, new_trainer, require_same_end


class WithoutLoss(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return {"logits": self.layers(x).squeeze(-1)}


class Meter:
    """What many a script has one of."""

    def __init__(self) -> None:
        self.total = 0.0

    def add(self, value: float) -> float:
        self.total += value
        return self.total


class Settings(dict):  # type: ignore[type-arg]
    """A dictionary with a class of its own."""


STATS: dict[str, float] = {}
SETTINGS = Settings(calls=0.0)
NAMES = SimpleNamespace(calls=0.0)
VISITS: dict[int, int] = {}
LOSSES: list[float] = []
METER = Meter()
NUMBERS = np.random.default_rng(5)
DICE = random.Random(5)


def _start_the_script_anew() -> None:
    STATS.clear()
    LOSSES.clear()
    VISITS.clear()
    SETTINGS["calls"] = NAMES.calls = 0.0
    METER.total = 0.0
    NUMBERS.bit_generator.state = np.random.default_rng(5).bit_generator.state
    DICE.seed(5)
    Noisy.numbers.seed(5)
    default = _with_default.__defaults__
    assert default is not None
    default[0].clear()


def _noise() -> float:
    return DICE.random()


def _with_default(seen: list[int] = []) -> int:  # noqa: B006 - as people write it
    seen.append(1)
    return len(seen)


class Noisy(Rows):
    """Draws from where it is told."""

    numbers = np.random.RandomState(5)

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = super().__getitem__(index)
        drawn = {"module": NUMBERS.random, "helper": _noise, "class": self.numbers.rand}[self._source]()
        return row | {"x": row["x"] + float(drawn)}


def _collate(rows: list[dict[str, Any]], dice: random.Random = random.Random(7)) -> dict[str, Any]:  # noqa: B008
    batch = torch.utils.data.default_collate(rows)
    return batch | {"x": batch["x"] * dice.random()}


def _factor(source: str) -> float:
    if source == "dict":
        STATS["calls"] = STATS.get("calls", 0.0) + 1
        return STATS["calls"]
    if source == "dict of a class":
        SETTINGS["calls"] += 1
        return float(SETTINGS["calls"])
    if source == "namespace":
        NAMES.calls += 1
        return NAMES.calls
    if source == "list":
        LOSSES.append(0.5)
        return sum(LOSSES)
    if source == "object":
        return METER.add(0.5)
    if source == "default":
        return float(_with_default())
    return float(NUMBERS.random())


def _weighted(source: str) -> Callable[..., Any]:
    def compute_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.mse_loss(outputs["logits"], labels) * _factor(source)

    return compute_loss


def _trainer(folder: Path, kind: str, source: str) -> Trainer:
    _start_the_script_anew()
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = WithoutLoss() if kind == "loss" else Net()
    if kind == "loss":
        given: dict[str, Any] = {"compute_loss_func": _weighted(source)}
        return new_trainer(folder, LifecycleCallback(), model=model, with_trainer=given, max_steps=8)
    given = {"data_collator": _collate} if source == "default" else {}
    train = Rows() if source == "default" else Noisy(source)
    return new_trainer(folder, LifecycleCallback(), model=model, train=train, with_trainer=given, max_steps=8)


@pytest.mark.parametrize(
    ("kind", "source"),
    [("loss", source) for source in ("dict", "dict of a class", "namespace", "list", "object", "default", "generator")]
    + [("data", source) for source in ("module", "helper", "class", "default")],
)
def test_what_a_script_keeps_goes_on(kind: str, source: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = _trainer(tmp_path / "whole", kind, source)
    whole.train()
    break_off(_trainer(tmp_path / "broken", kind, source), step=6)
    resumed = _trainer(tmp_path / "broken", kind, source)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)
    assert "not exact" not in caplog.text


class Visited(Rows):
    """Scales a row by how often rows were read."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        VISITS[index] = VISITS.get(index, 0) + 1
        row = super().__getitem__(index)
        return row | {"x": row["x"] * sum(VISITS.values())}


def test_what_a_dataset_counts_in_its_module_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _start_the_script_anew()
    new_trainer(tmp_path, LifecycleCallback(), train=Visited(), max_steps=8).train()
    assert "train_dataset.Visited.__getitem__.VISITS changes during training, and batches are prepared" in caplog.text


def test_values_by_keys_that_no_file_can_hold_end_no_training(tmp_path: Path) -> None:
    class Keeps(TrainerCallback):
        def __init__(self) -> None:
            self.calls: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.calls[model] = self.calls.get(model, 0) + 1

    break_off(new_trainer(tmp_path, Keeps(), LifecycleCallback()), step=4)
    resumed = new_trainer(tmp_path, Keeps(), LifecycleCallback())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_module_in_a_closure_is_not_searched_and_no_object_is_asked_for_names(tmp_path: Path) -> None:
    import ctypes

    class Loads(Rows):
        """Holds what would load a library for each name that it is asked for."""

        libraries = ctypes.cdll

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return row | {"x": row["x"] * ctypes.sizeof(ctypes.c_char)}

    break_off(new_trainer(tmp_path, LifecycleCallback(), train=Loads()), step=4)
    resumed = new_trainer(tmp_path, LifecycleCallback(), train=Loads())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_what_libraries_keep_is_not_a_users() -> None:
    assert not [one for one in (np, torch, random, Trainer, np.random.rand, break_off.__class__) if is_of_user(one)]
    assert all(map(is_of_user, (Noisy, _noise, Meter)))
    assert list(variables_of(torch.utils.data.default_collate)) == []
    assert [one.name for one in variables_of(_noise)] == ["DICE"]


def test_generators_of_everyone_belong_to_no_one() -> None:
    def draws() -> Any:
        return np.random.rand() + random.random() + float(torch.rand(()))

    assert find_generators(draws, "draws") == {}


SCRIPT = """
import torch
from transformers import TrainerCallback
from tests.trainer.runs import new_trainer

calls = 0

class Meter:
    def __init__(self):
        self.taken, self.scale = 0, torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.Adam(self.scale.parameters(), 0.1)

class Counts(TrainerCallback):
    def __init__(self):
        self.meter = Meter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        global calls
        calls += 1
        meter = self.meter
        meter.taken += 1
        meter.scale.weight.sum().backward()
        meter.optimizer.step()
        model.layers[1].p = 0.02 * (calls + meter.taken) + 0.01 * abs(meter.scale.weight.item())

def make(folder, callback):
    torch.manual_seed(3)
    return new_trainer(folder, Counts(), callback)
"""


def _not_registered(path: Path) -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("plugin", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def _executed(path: Path) -> dict[str, Any]:
    variables = {"__name__": "job"}
    exec(path.read_text(), variables)
    return variables


def _executed_without_name(path: Path) -> dict[str, Any]:
    variables: dict[str, Any] = {}
    exec(path.read_text(), variables)
    return variables


_RUNS = [_not_registered, _executed, _executed_without_name, lambda path: runpy.run_path(str(path))]


@pytest.mark.parametrize("load", _RUNS)
def test_script_that_is_no_module_goes_on_with_its_variables(load: Any, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)

    def make(name: str) -> Any:
        return load(tmp_path / "script.py")["make"](tmp_path / name, LifecycleCallback())

    require_same_end(make)
