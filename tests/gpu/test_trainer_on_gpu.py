"""Under Trainer on the device: an interrupted run ends with the bits of the uninterrupted one, in each precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.swa_utils import AveragedModel
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.state.fingerprint import leaf_digests
from tests.gpu.device import HAS_CUDA, on_cuda, on_device
from tests.trainer.runs import Net, new_trainer, require_same_end

# Dropout on the device, so that its generator decides about every step.
KINDS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "foreach": {"optim": "adamw_torch"},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "clipped": {"bf16": True, "gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "workers": {"dataloader_num_workers": 2, "dataloader_pin_memory": True},
}


def _kinds(*names: str) -> list[Any]:
    return [pytest.param(KINDS[name], marks=on_cuda if name == "fp16" else (), id=name) for name in names or KINDS]


def _trainer(place: Path, *more: TrainerCallback, async_save: bool = True, **settings: Any) -> Trainer:
    given = {"use_cpu": not HAS_CUDA, "max_steps": 10, **settings}
    return new_trainer(place, *more, LifecycleCallback(async_save=async_save), **given)


def _goes_on_exactly(make: Any, folder: Path) -> None:
    resumed, unbroken = require_same_end(lambda name: make(folder / name), step=7)
    rows = [[row for row in one.state.log_history if "loss" in row] for one in (resumed, unbroken)]
    assert rows[0] == rows[1]


@on_device
@pytest.mark.parametrize("settings", _kinds())
def test_interrupted_run_ends_with_the_bits_of_the_uninterrupted_one(settings: dict[str, Any], tmp_path: Path) -> None:
    _goes_on_exactly(lambda place: _trainer(place, **settings), tmp_path)
    events = [event.event for event in read_events(tmp_path / "unbroken")]
    assert events.count("snapshot") == events.count("written") == 4  # of 5 saves; the first is Trainer's own


@on_device
def test_so_does_one_that_saves_in_the_training_loop(tmp_path: Path) -> None:
    _goes_on_exactly(lambda place: _trainer(place, async_save=False), tmp_path)


@on_device
@pytest.mark.parametrize("settings", _kinds("fp32", "foreach", "fp16"))
def test_background_checkpoint_has_the_files_and_bytes_of_one_that_trainer_saved(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    for name, async_save in (("background", True), ("at_once", False)):
        _trainer(tmp_path / name, async_save=async_save, **settings).train()
    background, at_once = (tmp_path / name / "checkpoint-8" for name in ("background", "at_once"))
    assert problems_of(background, full=True) == []
    names = {path.name for path in at_once.iterdir()}
    assert {path.name for path in background.iterdir()} == names
    for name in names & {"model.safetensors", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth"}:
        assert (background / name).read_bytes() == (at_once / name).read_bytes(), name


class Average(TrainerCallback):
    """Keeps an average of the weights, on their device."""

    def __init__(self) -> None:
        self.average: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.average is None:
            self.average = AveragedModel(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.average.update_parameters(model)


@on_device
def test_average_of_the_weights_on_the_device_goes_on(tmp_path: Path) -> None:
    averages = []

    def make(place: Path) -> Trainer:
        averages.append(Average())
        return _trainer(place, averages[-1])

    _goes_on_exactly(make, tmp_path)
    unbroken, _, resumed = (leaf_digests(dict(one.average.state_dict()), "average") for one in averages)
    assert resumed == unbroken


class Partly(Net):
    """A network that is frozen but for its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0].requires_grad_(False)
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.count += 1
        return super().forward(x, labels)


@on_device
def test_frozen_weights_and_a_buffer_outside_the_state_dict_go_on(tmp_path: Path) -> None:
    def make(place: Path) -> Trainer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            model = Partly()
        return _trainer(place, model=model)

    _goes_on_exactly(make, tmp_path)


@on_device
def test_compiled_model_goes_on_exactly(tmp_path: Path) -> None:
    compiled = {} if HAS_CUDA else {"torch_compile_backend": "aot_eager"}
    _goes_on_exactly(lambda place: _trainer(place, torch_compile=True, **compiled), tmp_path)
