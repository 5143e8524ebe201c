"""In a custom loop on the device: an interrupted run ends with the bits of the uninterrupted one, in each precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.state.fingerprint import leaf_digests
from tests.accelerator.tiny import Script
from tests.gpu.device import DEVICE, HAS_CUDA, on_cuda, on_device
from tests.resume.cases.tiny import Regressor, Rows
from tests.resume.harness import forget_last_attempt
from tests.trainer.runs import mix_generators


class Averaging(Script):
    """A script that keeps an average of the weights, on their device."""

    average: Any

    def train(self, batch: Any) -> None:
        assert batch["x"].device.type == DEVICE.type
        super().train(batch)
        self.average.update_parameters(self.model)


def _script(folder: Path, precision: str, **loading: Any) -> Averaging:
    forget_last_attempt()
    if folder.exists():  # a process that resumes has its generators elsewhere
        mix_generators()
    else:
        set_seed(3)
    accelerator = Accelerator(cpu=not HAS_CUDA, mixed_precision=precision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = Regressor(norm=True)
    average = AveragedModel(model).to(accelerator.device)
    manager = TrainingStateManager(accelerator, folder, objects={"average": average})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(), batch_size=4, shuffle=True, **loading)
    script = Averaging(accelerator, manager, *accelerator.prepare(model, optimizer, loader))
    script.average = average
    return script


@on_device
@pytest.mark.parametrize("wait", [True, False], ids=["at_once", "background"])
@pytest.mark.parametrize(
    ("precision", "loading"),
    [
        ("no", {}),
        ("bf16", {}),
        pytest.param("fp16", {}, marks=on_cuda),
        ("no", {"num_workers": 2, "pin_memory": True}),
    ],
    ids=["fp32", "bf16", "fp16", "workers"],
)
def test_interrupted_loop_ends_with_the_bits_of_the_uninterrupted_one(
    precision: str, loading: dict[str, Any], wait: bool, tmp_path: Path
) -> None:
    ends = []
    for folder, stops in (("unbroken", (0,)), ("broken", (9, 0))):
        for stop_at in stops:
            script = _script(tmp_path / folder, precision, **loading)
            script.manager.resume()
            script.run(save_at=(2, 4, 7, 10), stop_at=stop_at, wait=wait)
            script.manager.close()
        drawn = torch.rand(4, device=DEVICE)
        ends.append((script.digests(), leaf_digests(dict(script.average.state_dict()), "average"), drawn.tolist()))
    assert ends[0] == ends[1]
    events = [event.event for event in read_events(tmp_path / "unbroken")]
    assert events.count("snapshot") == (0 if wait else 3)  # of 4 saves; the first is accelerate's own
