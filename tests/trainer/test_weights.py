"""Restored state is proved, repaired where Trainer loses it, and refused where it is not what was saved."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.resume import repair
from hf_lifecycle.state.fingerprint import module_tensors
from hf_lifecycle.state.proof import Proof, unwrapped

from .runs import Net, break_off, digests, images, mix_generators, new_trainer, reseal, saved_run, tiny_vit


def flip_tensor_byte(file: Path, name: str) -> None:
    """Flip one bit of a tensor in a safetensors file."""
    content = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    begin, _ = json.loads(content[8 : 8 + length])[name]["data_offsets"]
    content[8 + length + begin] ^= 1
    file.write_bytes(content)
    reseal(file.parent)


def test_a_flipped_byte_in_the_weights_is_found_by_name(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    flip_tensor_byte(checkpoint / "model.safetensors", "layers.2.weight")
    with pytest.raises(ResumeMismatch, match="layers\\.2\\.weight differs from what was saved") as raised:
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)
    assert not any("layers.0" in problem for problem in raised.value.problems)


def test_a_flipped_byte_in_the_weights_of_a_pretrained_model_is_found_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, told = images(), "model: classifier.weight differs from what was saved"
    break_off(new_trainer(tmp_path, LifecycleCallback(), model=tiny_vit(), train=data))
    flip_tensor_byte(tmp_path / "checkpoint-4" / "model.safetensors", "classifier.weight")
    resumed = new_trainer(tmp_path, LifecycleCallback(), model=tiny_vit(), train=data)
    with pytest.raises(ResumeMismatch, match=r"classifier\.weight") as raised:
        resumed.train(resume_from_checkpoint=True)
    assert [problem for problem in raised.value.problems if "differs from what was saved" in problem] == [told]
    resumed = new_trainer(tmp_path, LifecycleCallback(strict=False), model=tiny_vit(), train=data)
    resumed.train(resume_from_checkpoint=True)  # by the user's choice
    assert f"not exact: {told}" in caplog.text


def test_changed_optimizer_state_is_found_by_name(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["state"][1]["exp_avg"][0] += 1e-3
    torch.save(state, checkpoint / "optimizer.pt")
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch, match="optimizer\\.state\\.1\\.exp_avg differs from what was saved"):
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)


def test_changed_scheduler_state_is_found_by_name(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    state = torch.load(checkpoint / "scheduler.pt", weights_only=True)
    state["last_epoch"] += 1
    torch.save(state, checkpoint / "scheduler.pt")
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch, match="scheduler\\.last_epoch differs from what was saved"):
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)


def test_a_missing_optimizer_file_is_found(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    (checkpoint / "optimizer.pt").unlink()
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch, match="optimizer"):
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)


def test_every_problem_is_named_at_once(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    for name in ("layers.0.bias", "layers.2.weight"):
        flip_tensor_byte(checkpoint / "model.safetensors", name)
    (checkpoint / "scheduler.pt").unlink()
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch) as raised:
        new_trainer(tmp_path, LifecycleCallback()).train(resume_from_checkpoint=True)
    told = " ".join(raised.value.problems)
    assert all(name in told for name in ("layers.0.bias", "layers.2.weight", "scheduler.last_epoch"))


class Smaller(Net):
    """Lacks a layer that was saved."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 1))


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises((ResumeMismatch, ValueError, RuntimeError)):
        new_trainer(tmp_path, LifecycleCallback(), model=Smaller()).train(resume_from_checkpoint=True)


class Buffers(Net):
    """Counts what it has seen in buffers that ``state_dict()`` leaves out."""

    def __init__(self, *, growing: bool = False) -> None:
        super().__init__()
        self.growing = growing
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("fixed", torch.arange(3.0), persistent=False)
        self.register_buffer("history", torch.zeros(0), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = super().forward(x, labels)
        if self.training:
            self.seen += len(x)
            if self.growing:
                self.history = torch.cat([self.history, out["loss"].detach().reshape(1)])
        out["loss"] = out["loss"] + 0.01 * self.layers[0].weight.sum() * self.seen
        return out


def whole_and_resumed(tmp_path: Path, **made: Any) -> tuple[Any, Any]:
    """The same training unbroken, and broken off at step 4 and resumed; values of ``made`` are made for each run."""

    def trainer(name: str) -> Any:
        return new_trainer(tmp_path / name, LifecycleCallback(), **{key: make() for key, make in made.items()})

    whole = trainer("whole")
    whole.train()
    break_off(trainer("broken"))
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    return whole, resumed


@pytest.mark.parametrize("growing", [False, True])
def test_buffers_outside_the_state_dict_that_training_changes_are_restored(tmp_path: Path, growing: bool) -> None:
    whole, resumed = whole_and_resumed(tmp_path, model=lambda: seeded(lambda: Buffers(growing=growing)))
    assert resumed.model.seen == 24
    assert digests(resumed) == digests(whole)


def seeded(make: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return make()


class WideSgd(torch.optim.Optimizer):
    """Momentum in float32 whatever the dtype of the parameters, and a nested state."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["count"] = 0
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                state["count"] += 1
                parameter.sub_((group["lr"] * state["momentum"]).to(parameter.dtype))


class Narrow(Net):
    """Parameters in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x.to(torch.bfloat16), labels.to(torch.bfloat16))


def test_optimizer_state_wider_than_its_parameters_keeps_its_dtype(tmp_path: Path) -> None:
    def trainer(name: str) -> Any:
        model = seeded(Narrow)
        optimizer = WideSgd(model.parameters())
        return new_trainer(
            tmp_path / name, LifecycleCallback(), model=model, with_trainer={"optimizers": (optimizer, None)}
        )

    whole = trainer("whole")
    whole.train()
    break_off(trainer("broken"))
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    states = resumed.optimizer.state_dict()["state"].values()
    assert all(state["momentum"].dtype == torch.float32 for state in states)
    assert digests(resumed) == digests(whole)


def test_weights_that_trainer_loses_are_repaired(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = images()
    whole, resumed = whole_and_resumed(tmp_path, model=tiny_vit, train=lambda: data)
    assert digests(resumed) == digests(whole)
    loses = bool(repair.lost_by_stock_loading(tiny_vit(), tmp_path / "broken" / "checkpoint-4"))
    assert ("had not been loaded" in caplog.text) == loses  # not every version renames ViT's keys


def test_weights_that_trainer_loses_are_repaired_from_a_stock_checkpoint_too(tmp_path: Path) -> None:
    data = images()
    stock = break_off(new_trainer(tmp_path, model=tiny_vit(), train=data))
    saved = {name: tensor.clone() for name, tensor in module_tensors(stock.model).items()}
    resumed = new_trainer(tmp_path, LifecycleCallback(), model=tiny_vit(), train=data)
    break_off(resumed, at="on_train_begin", step=4, resume=True)
    restored = module_tensors(resumed.model)
    assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())


def test_a_stock_checkpoint_in_a_moved_directory_is_repaired_too(tmp_path: Path) -> None:
    data = images()
    stock = break_off(new_trainer(tmp_path / "a", model=tiny_vit(), train=data))
    saved = {name: tensor.clone() for name, tensor in module_tensors(stock.model).items()}
    shutil.move(tmp_path / "a" / "checkpoint-4", tmp_path / "kept")
    resumed = new_trainer(tmp_path / "b", LifecycleCallback(), model=tiny_vit(), train=data)
    break_off(resumed, at="on_train_begin", step=4, resume=str(tmp_path / "kept"))
    restored = module_tensors(resumed.model)
    assert all(torch.equal(restored[name], tensor) for name, tensor in saved.items())


def test_repair_moves_no_generator_and_touches_what_it_is_told(tmp_path: Path) -> None:
    model = tiny_vit()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    before = torch.get_rng_state()
    assert repair.model_from_checkpoint(model, tmp_path, ["classifier.weight"]) is None
    assert torch.equal(torch.get_rng_state(), before)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(model.classifier.weight, saved["classifier.weight"])
    assert not torch.equal(model.classifier.bias, saved["classifier.bias"])


def test_a_model_of_another_library_says_why_it_cannot_be_repaired(tmp_path: Path) -> None:
    assert "Net is not a PreTrainedModel" in str(repair.model_from_checkpoint(Net(), tmp_path, ["layers.0.bias"]))
    assert repair.lost_by_stock_loading(Net(), tmp_path) == []
    assert repair.lost_by_stock_loading(tiny_vit(), tmp_path) == []


def test_a_checkpoint_that_from_pretrained_cannot_read_says_why(tmp_path: Path) -> None:
    assert "from_pretrained" in str(repair.model_from_checkpoint(tiny_vit(), tmp_path, ["classifier.bias"]))


def test_a_parameter_used_twice_is_not_lost_for_being_saved_once(tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    shape: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = BertForMaskedLM(BertConfig(vocab_size=8, intermediate_size=8, **shape))
    model.save_pretrained(tmp_path)
    assert repair.lost_by_stock_loading(model, tmp_path) == []


def test_the_model_inside_its_wrappers_is_proved() -> None:
    net = Net()
    assert unwrapped(net) is net
    assert unwrapped(nn.DataParallel(net)) is net


def test_a_proof_says_what_it_counted() -> None:
    assert str(Proof({"model tensors": 4, "repaired": 0})) == "4 model tensors"


def test_a_frozen_parameter_written_behind_its_version_counter_is_seen(tmp_path: Path) -> None:
    def model() -> nn.Module:
        net = seeded(Net)
        net.layers[0].weight.requires_grad_(False)
        return net

    from transformers import TrainerCallback

    class Momentum(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.layers[0].weight.data.mul_(0.5)

    def trainer(name: str) -> Any:
        return new_trainer(tmp_path / name, Momentum(), LifecycleCallback(), model=model())

    whole = trainer("whole")
    whole.train()
    mix_generators()
    break_off(trainer("broken"))
    resumed = trainer("broken")
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)


def _wider(net: Net) -> Net:
    net.layers[0], net.layers[2] = nn.Linear(4, 9), nn.Linear(9, 1)
    return net


def _grown(net: Net) -> Net:
    net.more = nn.Linear(1, 1)
    return net


def _frozen(net: Net) -> Net:
    net.layers[0].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_wider, ["layers.0.weight has the shape [8, 4] in the checkpoint, and [9, 4] here"]),
        (_grown, ["more.bias, more.weight: here, but not in the checkpoint"]),
        (_frozen, ["optimizer has groups of 2, 1 parameters, and had groups of 2, 2 when it was saved"]),
    ],
)
def test_what_trainer_cannot_load_is_named_in_place_of_its_own_error(
    change: Any, said: list[str], tmp_path: Path
) -> None:
    saved_run(tmp_path)
    other = new_trainer(tmp_path, LifecycleCallback(), model=change(Net()))
    with pytest.raises(ResumeMismatch, match="make the model and the optimizer as the script that saved did") as raised:
        other.train(resume_from_checkpoint=True)
    for one in said:
        assert one in str(raised.value)


def test_pretrained_model_that_grew_is_named_before_its_optimizer_is_loaded(tmp_path: Path) -> None:
    data, grown = images(), tiny_vit()
    break_off(new_trainer(tmp_path, LifecycleCallback(), model=tiny_vit(), train=data))
    grown.more = nn.Linear(1, 1)
    with pytest.raises(ResumeMismatch, match="optimizer has groups of") as raised:
        new_trainer(tmp_path, LifecycleCallback(), model=grown, train=data).train(resume_from_checkpoint=True)
    assert raised.value.problems[0] == "more.bias, more.weight: here, but not in the checkpoint"


def test_adapter_of_another_rank_is_named_in_place_of_pefts_own_error(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def adapted(rank: int) -> Any:
        return peft.get_peft_model(tiny_vit(), peft.LoraConfig(r=rank, target_modules=["query", "q_proj"]))

    data = images()
    break_off(new_trainer(tmp_path, LifecycleCallback(), model=adapted(2), train=data))
    other = new_trainer(tmp_path, LifecycleCallback(), model=adapted(4), train=data)
    with pytest.raises(
        ResumeMismatch, match=r"lora_A\.weight has the shape \[2, \d+\] in the checkpoint, and \[4, \d+\]"
    ):
        other.train(resume_from_checkpoint=True)
