"""What training changes of the model itself, beside values, is named at the next save."""

from __future__ import annotations

import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.accelerator.tiny import new_script
from tests.field.limits import Limit
from tests.trainer.runs import new_trainer

REWIRED = Limit(
    what="Hooks, parameters, modules and methods that training adds to a model, replaces or removes",
    when="at a save",
    line=(
        "maybe not exact: the structure of the model changes during training, and a resumed run builds it without "
        "that change: …; make the change before training starts, or in every run at its start"
    ),
)


def _hook(model: Any) -> None:
    model.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)


def _gradient_hook(model: Any) -> None:
    model.layers[0].weight.register_hook(lambda gradient: gradient * 0.1)


def _method(model: Any) -> None:
    layer = model.layers[0]
    layer.forward = types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), layer)


def _parameter(model: Any) -> None:
    model.layers[0].bias = nn.Parameter(torch.ones_like(model.layers[0].bias))


def _module(model: Any) -> None:
    model.layers[0] = nn.Sequential(model.layers[0], nn.Dropout(0.2))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (_hook, "_forward_hooks of model{}.layers.0"),
    "gradient's hook": (_gradient_hook, "hooks of model{}.layers.0.weight"),
    "method": (_method, "model{}.layers.0.forward"),
    "parameter": (_parameter, "model{}.layers.0.bias"),
    "module": (_module, "model{}.layers.0"),
}


class Rewires(TrainerCallback):
    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.change(model)


@pytest.mark.parametrize("changed", CHANGES)
def test_change_of_the_model_is_named_once(changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    change, name = CHANGES[changed]
    new_trainer(tmp_path, Rewires(change), LifecycleCallback(), max_steps=8).train()
    REWIRED.require_told(caplog.text)
    assert name.format("") in caplog.text
    assert caplog.text.count("the structure of the model") == 1


@pytest.mark.parametrize("changed", CHANGES)
def test_change_of_the_model_in_a_loop_is_named_once(
    changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, name = CHANGES[changed]
    new_script(tmp_path).run(save_at=range(0, 13, 2), change=change, change_at=3).manager.close()
    REWIRED.require_told(caplog.text)
    assert name.format(" 0") in caplog.text
    assert caplog.text.count("the structure of the model") == 1


def test_method_that_is_replaced_and_put_back_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(model: Any) -> None:
        own = model.layers[0].forward
        model.layers[0].forward = lambda x: own(x)
        model.layers[0].forward = own  # as its class has it, but in its attributes now

    new_trainer(tmp_path, Rewires(change), LifecycleCallback(), max_steps=8).train()
    assert "not exact" not in caplog.text


def test_model_that_stays_as_it_is_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Watches(TrainerCallback):
        """Hooks that are there at the begin, and that come and go within a step."""

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            _hook(model)

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.handle = model.layers[0].register_forward_hook(lambda module, inputs, output: None)

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.handle.remove()
            nn.init.zeros_(model.layers[0].bias.data)

    new_trainer(tmp_path, LifecycleCallback(), Watches(), max_steps=8).train()
    assert "the structure of the model" not in caplog.text


def _counts_below_its_save(folder: Path, *, stop_at: int = 0, hook_at: int = 0) -> dict[str, str]:
    """A loop that saves in each body, and below that changes a count of the model by which it then trains."""
    script = new_script(folder, generators=3)
    script.model.count = 0
    script.manager.resume()
    for _ in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            script.manager.save()
            script.model.count += 1
            with torch.no_grad():
                for one in script.model.parameters():
                    one.add_(1e-3 * script.model.count)
            if script.manager.progress.step == hook_at:
                _hook(script.model)
            if stop_at and script.manager.progress.step > stop_at:  # the save before was made again at its body's end
                script.manager.close()
                return {}
    script.manager.close()
    return script.digests()


def test_save_that_is_made_again_has_the_values_and_names_a_change_of_the_model_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = _counts_below_its_save(tmp_path / "whole")
    assert not REWIRED.is_told_in(caplog.text)
    _counts_below_its_save(tmp_path / "broken", stop_at=4)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-5")  # of the body that was left
    assert _counts_below_its_save(tmp_path / "broken") == whole
    assert not REWIRED.is_told_in(caplog.text)
    _counts_below_its_save(tmp_path / "hooked", hook_at=3)
    REWIRED.require_told(caplog.text)
    assert caplog.text.count("_forward_hooks of model 0.layers.0") == 1
