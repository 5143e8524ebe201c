"""What is loaded and is not what was saved ends a resume by name; with ``strict=False`` it goes on, as stock does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback, TrainingStateManager
from hf_lifecycle.errors import ResumeMismatch
from tests.trainer.runs import Net, Rows, break_off, new_trainer


class Decays(TrainerCallback):
    """Sets a weight decay before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for group in kwargs["optimizer"].param_groups:
            group["weight_decay"] = 0.5


class Shifts(TrainerCallback):
    """Changes a weight before the first step."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            kwargs["model"].layers[0].bias.add_(1)


@pytest.mark.parametrize(
    ("new", "told"),
    [
        (Decays, "optimizer: optimizer.param_groups.0.weight_decay differs from what was saved"),
        (Shifts, "model: layers.0.bias differs from what was saved"),
    ],
)
def test_callback_that_is_new_at_a_resume_and_changes_what_was_loaded_is_an_error_or_by_choice_a_warning(
    new: type[TrainerCallback], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback()))
    with pytest.raises(ResumeMismatch) as caught:
        new_trainer(tmp_path, new(), LifecycleCallback()).train(resume_from_checkpoint=True)
    assert told in str(caught.value)
    assert "strict=False" in str(caught.value)
    caplog.set_level(logging.WARNING, "hf_lifecycle")
    resumed = new_trainer(tmp_path, new(), LifecycleCallback(strict=False))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert f"not exact: {told}" in caplog.text


class Forgets(Net):
    """Loads its state but for one tensor."""

    def load_state_dict(self, state: Any, *given: Any, **named: Any) -> Any:
        loaded = super().load_state_dict(state, *given, **named)
        with torch.no_grad():
            self.layers[0].bias.zero_()
        return loaded


def test_loop_whose_model_loads_something_else_ends_or_by_choice_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(steps: int, *, strict: bool = True) -> int:
        accelerator = Accelerator(cpu=True)
        manager = TrainingStateManager(accelerator, tmp_path, strict=strict)
        model = Forgets()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, loader = accelerator.prepare(
            model, optimizer, torch.utils.data.DataLoader(Rows(), batch_size=4)
        )
        try:
            manager.resume()
            for batch in manager.batches(loader):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                if manager.progress.step == 2:
                    manager.save()
                if manager.progress.step == steps:
                    break
            return manager.progress.step
        finally:
            manager.close()

    assert run(2) == 2
    with pytest.raises(ResumeMismatch, match="strict=False"):
        run(4)
    caplog.set_level(logging.WARNING, "hf_lifecycle")
    assert run(4, strict=False) == 4
    assert "layers.0.bias differs from what was saved" in caplog.text
