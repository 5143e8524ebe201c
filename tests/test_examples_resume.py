"""Each example, broken off and run again by the same command, ends as the one that nobody interrupted."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import TrainerCallback

from hf_lifecycle import TrainingStateManager

EXAMPLES = Path(__file__).parent.parent / "examples"


class BrokenOff(BaseException):
    """The example was broken off; nobody may catch it and go on."""


class _Breaker(TrainerCallback):
    """Breaks off at the first batch of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise BrokenOff


def example(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) < 80
    found = importlib.util.spec_from_file_location(f"example_{name}", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "step", "needs"),
    [
        ("trainer", 14, ()),
        ("trainer_lora", 14, ("peft",)),
        ("early_stopping", 87, ("sklearn",)),
        ("own_objects", 25, ("sklearn",)),
    ],
)
def test_example_broken_off_and_run_again_ends_the_same(
    name: str, step: int, needs: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hf_lifecycle")
    for package in needs:
        pytest.importorskip(package)
    script = example(name)
    whole = script.main(str(tmp_path / "whole"))
    made = script.make_trainer(str(tmp_path / "run"))
    trainer = made[0] if isinstance(made, tuple) else made
    trainer.add_callback(_Breaker(step))
    with pytest.raises(BrokenOff):
        trainer.train()
    assert script.main(str(tmp_path / "run")) == whole
    (resumed,) = [said for said in caplog.messages if said.startswith("resumed from")]
    assert f"at step {step // 10 * 10}" in resumed


@pytest.mark.slow
def test_custom_loop_broken_off_and_run_again_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    script = example("custom_loop")
    whole = script.main(str(tmp_path / "whole.safetensors"))
    save = TrainingStateManager.save_state

    def save_and_break(self: TrainingStateManager, path: Any, epoch: float, *args: Any, **kwargs: Any) -> None:
        save(self, path, epoch, *args, **kwargs)
        if epoch == 2:
            raise BrokenOff

    monkeypatch.setattr(TrainingStateManager, "save_state", save_and_break)
    with pytest.raises(BrokenOff):
        script.main(str(tmp_path / "run.safetensors"))
    monkeypatch.setattr(TrainingStateManager, "save_state", save)
    capsys.readouterr()
    assert script.main(str(tmp_path / "run.safetensors")) == whole
    assert capsys.readouterr().out.startswith("epoch 3: ")
