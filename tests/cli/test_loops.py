"""The commands on what a loop on accelerate saved: two models, early stopping among its objects, one run resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer.runs import reseal

from hf_lifecycle import EarlyStopping
from tests.accelerator.tiny import Counter, Script, new_script
from tests.resume.cases.tiny import Regressor


class Noted(Counter):
    """An object that the user registers with accelerate, which stores it by its position."""


def script(directory: Path) -> tuple[Script, EarlyStopping]:
    early = EarlyStopping(patience=3)
    made = new_script(directory, objects={"early_stopping": early, "counter": Counter(3)})
    made.accelerator.prepare(Regressor())  # its tensors have the names of the first model's
    made.accelerator.register_for_checkpointing(Noted(5))
    return made, early


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A loop of 12 steps that saved at 4 and at 8, and the one that was broken off at 4 and resumed."""
    whole, resumed = tmp_path_factory.mktemp("whole") / "run", tmp_path_factory.mktemp("resumed") / "run"
    made, early = script(whole)
    early.step(0.5)
    made.run(save_at=(4, 8))
    made.manager.close()
    shutil.copytree(whole / "checkpoint-4", resumed / "checkpoint-4")
    made, _ = script(resumed)
    assert made.manager.resume() is not None
    made.run(save_at=(8,))
    made.manager.close()
    return whole, resumed


def test_resumed_loop_is_identical_to_the_one_never_broken_off(invoke: Any, loops: tuple[Path, Path]) -> None:
    pair = [run / "checkpoint-8" for run in loops]
    result = invoke("diff", *pair, "--json")
    assert result.exit_code == 0, result.stdout
    compared = {group["name"]: group["compared"] for group in json.loads(result.stdout)["groups"]}
    assert compared["weights"] == 8
    assert all(compared[name] for name in ("optimizer", "RNG", "objects", "training loop"))


def test_first_differences_of_two_steps_of_a_loop_are_of_the_weights_and_of_what_was_trained(
    invoke: Any, loops: tuple[Path, Path]
) -> None:
    result = invoke("diff", loops[0] / "checkpoint-4", loops[0] / "checkpoint-8", "--json")
    assert result.exit_code == 1
    found = {group["name"]: len(group["differences"]) for group in json.loads(result.stdout)["groups"]}
    assert found["weights"] == 4  # the other model is not trained
    assert found["optimizer"] > 0
    assert found["training loop"] > 0
    assert found["arguments"] == found["environment"] == found["data"] == 0


@pytest.mark.parametrize("name", ["model.safetensors", "model_1.safetensors"])
def test_weights_of_each_of_several_models_are_compared(
    invoke: Any, loops: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    other = Path(shutil.copytree(loops[0] / "checkpoint-8", tmp_path / "checkpoint-8"))
    tensors = load_file(other / name)
    changed = sorted(tensors)[0]
    tensors[changed] = tensors[changed] + 1
    save_file(tensors, other / name)
    reseal(other)
    first = json.loads(invoke("diff", loops[0] / "checkpoint-8", other, "--json").stdout)["first"]
    assert first["group"] == "weights"
    assert first["where"] == (changed if name == "model.safetensors" else f"model_1: {changed}")


def test_state_that_the_user_registered_with_accelerate_is_compared(
    invoke: Any, loops: tuple[Path, Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(loops[0] / "checkpoint-8", tmp_path / "checkpoint-8"))
    torch.save({"count": 6}, other / "custom_checkpoint_1.pkl")
    reseal(other)
    first = json.loads(invoke("diff", loops[0] / "checkpoint-8", other, "--json").stdout)["first"]
    assert first == {"group": "registered objects", "where": "custom_checkpoint_1: count", "what": "5 -> 6"}


def test_show_tells_of_early_stopping_and_of_each_loader_in_words(invoke: Any, loops: tuple[Path, Path]) -> None:
    shown = invoke("show", loops[1] / "checkpoint-8")
    assert shown.exit_code == 0
    text = " ".join(shown.stdout.split())
    assert "early stopping best 0.5; no improvement in the last 0 of 1 evaluations" in text
    assert "objects early_stopping (0 tensors), counter (0 tensors)" in text
    assert "epoch 1, step 8" in text
    assert "loader 0 passes 1, batch 2" in text
    assert "DataLoader, examples 24, batch_size 4" in text
    assert "{" not in text


def test_list_and_verify_find_a_loops_checkpoints_and_the_one_that_is_damaged(
    invoke: Any, loops: tuple[Path, Path], tmp_path: Path
) -> None:
    run = Path(shutil.copytree(loops[1], tmp_path / "run"))
    assert invoke("verify", run).exit_code == 0
    assert "newest intact: checkpoint-8" in invoke("list", run).stdout
    assert "checkpoint-4, step 4" in invoke("list", run).stdout  # the receipt of the resume
    (run / "checkpoint-8" / "custom_checkpoint_0.pkl").unlink()
    assert invoke("verify", run).exit_code == 1
    listed = invoke("list", run)
    assert listed.exit_code == 1
    assert "newest intact: checkpoint-4" in listed.stdout
    invoke("prune", run, "--keep-last", 1)
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
