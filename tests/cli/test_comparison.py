"""diff: every difference is found, bit for bit, nothing else is one, and nothing that is read can run code."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainer.runs import flip, new_trainer, reseal

from hf_lifecycle import LifecycleCallback


def differences(invoke: Any, a: Path, b: Path) -> dict[str, list[str]]:
    result = invoke("diff", a, b, "--json")
    report = json.loads(result.stdout)
    assert result.exit_code == (0 if report["identical"] else 1)
    return {
        group["name"]: [found["where"] for found in group["differences"]]
        for group in report["groups"]
        if group["differences"]
    }


def again(directory: Path, **settings: Any) -> Path:
    """The run of the fixture once more, or another one."""
    known = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss", "max_steps": 8}
    new_trainer(directory, LifecycleCallback(patience=5), **{**known, **settings}).train()
    return directory / "checkpoint-8"


def test_same_run_made_twice_is_identical(invoke: Any, original: Path, tmp_path: Path) -> None:
    twin = again(tmp_path / "twin")
    assert differences(invoke, original / "checkpoint-8", twin) == {}
    result = invoke("diff", original / "checkpoint-8", twin)
    assert "identical, bit for bit" in result.stdout


def test_other_seed_is_the_first_difference_and_all_that_follow_are_told(
    invoke: Any, original: Path, tmp_path: Path
) -> None:
    other = again(tmp_path / "other", seed=43)
    found = differences(invoke, original / "checkpoint-8", other)
    assert found["arguments"] == ["seed"]
    assert {"log", "weights", "optimizer", "RNG"} <= found.keys()
    assert len(found["weights"]) == 4
    result = invoke("diff", original / "checkpoint-8", other)
    assert "first in arguments: seed: 42 -> 43" in result.stdout


def test_one_bit_of_one_weight_is_found(invoke: Any, original: Path, run: Path) -> None:
    flip(run / "checkpoint-8" / "model.safetensors", -1)
    result = json.loads(invoke("diff", original / "checkpoint-8", run / "checkpoint-8", "--json").stdout)
    assert result["first"]["group"] == "weights"
    assert "1 of" in result["first"]["what"]


def test_negative_zero_is_another_zero(invoke: Any, original: Path, run: Path, tmp_path: Path) -> None:
    for directory, value in ((original, 0.0), (run, -0.0)):
        target = tmp_path / directory.name / str(value)
        target.mkdir(parents=True)
        tensors = load_file(directory / "checkpoint-8" / "model.safetensors")
        tensors["layers.2.bias"].fill_(value)
        save_file(tensors, target / "model.safetensors")
        (target / "trainer_state.json").write_text("{}")
    one, other = tmp_path / original.name / "0.0", tmp_path / run.name / "-0.0"
    assert differences(invoke, one, other) == {"weights": ["layers.2.bias"]}


def test_optimizer_state_is_compared_tensor_by_tensor(invoke: Any, original: Path, run: Path) -> None:
    path = run / "checkpoint-8" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    state["state"][1]["exp_avg"][0] += 1
    torch.save(state, path)
    reseal(run / "checkpoint-8")
    assert differences(invoke, original / "checkpoint-8", run / "checkpoint-8") == {"optimizer": ["state.1.exp_avg"]}


def test_log_rows_are_compared_without_clocks(invoke: Any, original: Path, run: Path) -> None:
    path = run / "checkpoint-8" / "trainer_state.json"
    state = json.loads(path.read_text())
    state["log_history"][1]["eval_runtime"] = 99.0
    path.write_text(json.dumps(state))
    reseal(run / "checkpoint-8")
    assert differences(invoke, original / "checkpoint-8", run / "checkpoint-8") == {}
    state["log_history"][0]["loss"] = 0.5
    path.write_text(json.dumps(state))
    reseal(run / "checkpoint-8")
    assert differences(invoke, original / "checkpoint-8", run / "checkpoint-8") == {"log": ["step 2: loss"]}


def test_stock_checkpoints_are_compared_with_their_rng_files(invoke: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        new_trainer(tmp_path / name, max_steps=2).train()
    found = differences(invoke, tmp_path / "a" / "checkpoint-2", tmp_path / "a" / "checkpoint-2")
    assert found == {}
    report = json.loads(
        invoke("diff", tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2", "--json").stdout
    )
    assert "RNG" in {group["name"] for group in report["groups"]}
    assert report["not_compared"]


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self._path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "scaler.pt", "extra.bin"])
def test_pickle_with_code_is_refused_and_runs_nothing(
    invoke: Any, original: Path, run: Path, tmp_path: Path, name: str
) -> None:
    victim = tmp_path / "victim"
    torch.save({"state": Bomb(victim)}, run / "checkpoint-8" / name)
    torch.save({"state": 1}, tmp_path / name)
    reseal(run / "checkpoint-8")
    result = invoke("diff", run / "checkpoint-8", run / "checkpoint-8")
    assert result.exit_code == 1
    assert "refused" in result.stderr
    for command in ("list", "verify"):
        invoke(command, run)
    invoke("show", run / "checkpoint-8")
    assert not victim.exists()


def test_files_of_deepspeed_are_compared_by_their_bytes(invoke: Any, original: Path, run: Path, tmp_path: Path) -> None:
    """They name its own classes, which nothing here unpickles."""
    folder = run / "checkpoint-8" / "global_step8"
    folder.mkdir()
    torch.save({"loss_scaler": Bomb(tmp_path / "victim")}, folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    reseal(run / "checkpoint-8")
    assert invoke("diff", run / "checkpoint-8", run / "checkpoint-8").exit_code == 0
    told = invoke("diff", original / "checkpoint-8", run / "checkpoint-8")
    assert told.exit_code == 1
    assert "global_step8/zero_pp_rank_0_mp_rank_00_optim_states.pt" in told.stdout
    assert not (tmp_path / "victim").exists()


def test_training_arguments_are_never_unpickled(invoke: Any, original: Path, run: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    (run / "checkpoint-8" / "training_args.bin").unlink()
    torch.save(Bomb(victim), run / "checkpoint-8" / "training_args.bin", pickle_module=pickle)
    reseal(run / "checkpoint-8")
    assert differences(invoke, original / "checkpoint-8", run / "checkpoint-8") == {}
    assert not victim.exists()


def self_containing() -> Any:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def doubling() -> Any:
    tree: list[Any] = [0]
    for _ in range(40):
        tree = [tree, tree]
    return tree


@pytest.mark.parametrize(
    "state", [self_containing(), doubling(), torch.zeros(1).expand(1 << 40)], ids=["endless", "doubling", "expanded"]
)
def test_state_that_would_exhaust_the_reader_is_refused(invoke: Any, run: Path, state: Any) -> None:
    torch.save(state, run / "checkpoint-8" / "optimizer.pt")
    reseal(run / "checkpoint-8")
    result = invoke("diff", run / "checkpoint-8", run / "checkpoint-8")
    assert result.exit_code == 1


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 40]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]},
        {"dtype": 7, "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32"},
        None,
    ],
)
def test_hostile_header_is_an_error_that_names_the_file(invoke: Any, run: Path, entry: Any) -> None:
    header = json.dumps({"x": entry}).encode()
    path = run / "checkpoint-8" / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    reseal(run / "checkpoint-8")
    result = invoke("diff", run / "checkpoint-8", run / "checkpoint-8")
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert invoke("show", run / "checkpoint-8").exit_code == 1


def test_damaged_checkpoint_is_not_compared(invoke: Any, original: Path, run: Path) -> None:
    (run / "checkpoint-8" / "scheduler.pt").unlink()
    result = invoke("diff", original / "checkpoint-8", run / "checkpoint-8")
    assert result.exit_code == 1
    assert "scheduler.pt: missing" in result.stderr


def test_files_in_folders_of_a_checkpoint_are_compared(invoke: Any, original: Path, run: Path, tmp_path: Path) -> None:
    """Where PEFT saves a second adapter."""
    one, other = run / "checkpoint-8", tmp_path / "checkpoint-8"
    (one / "second").mkdir()
    save_file({"lora": torch.ones(2)}, one / "second" / "adapter_model.safetensors")
    (one / "second" / "adapter_config.json").write_text("{}")
    shutil.copytree(one, other)
    assert differences(invoke, one, other) == {}
    save_file({"lora": torch.zeros(2)}, other / "second" / "adapter_model.safetensors")
    (other / "second" / "adapter_config.json").write_text("[]")
    assert differences(invoke, one, other) == {
        "weights": ["second: lora"],
        "other files": ["second/adapter_config.json"],
    }
