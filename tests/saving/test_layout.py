"""How a model's file is made of live tensors is learned where it is plain, and refused by name elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hf_lifecycle.saving.files.layout import NotLearned, learn

from .test_archive import Collected


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def stir(model: torch.nn.Module, seed: int) -> None:
    """As training does: no two tensors are alike."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in live_tensors(model).values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor.dtype))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2))


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=16, image_size=8, patch_size=4))


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(
        **sizes, vocab_size=32, intermediate_size=16, num_key_value_heads=2, num_local_experts=4, head_dim=4
    )
    return MixtralForCausalLM(config)


def _adapter() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(_gpt2(), LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))


MODELS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "tied weights": (_gpt2, {}),
    "shards": (_gpt2, {"max_shard_size": "4KB"}),
    "bfloat16": (lambda: _gpt2().to(torch.bfloat16), {}),
    "renamed keys": (_vit, {}),
    "experts in parts": (_mixtral, {}),
    "adapter": (_adapter, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_layout_writes_what_save_pretrained_writes_at_a_later_step(name: str, tmp_path: Path) -> None:
    make, settings = MODELS[name]
    model = make()
    stir(model, seed=1)
    model.save_pretrained(tmp_path / "first", **settings)
    files = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    assert (len(files) > 2) == (name == "shards")
    layouts = {file: learn(tmp_path / "first" / file, live_tensors(model)) for file in files}

    stir(model, seed=2)
    model.save_pretrained(tmp_path / "second", **settings)
    assert sorted(path.name for path in (tmp_path / "second").glob("*.safetensors")) == files
    for file, layout in layouts.items():
        sink = Collected()
        layout.write(sink, lambda tensor: live_tensors(model)[tensor])
        assert bytes(sink.data) == (tmp_path / "second" / file).read_bytes(), file
        assert layout.size == len(sink.data)


def test_computed_tensor_is_refused_by_name(tmp_path: Path) -> None:
    live = {"layer.weight": torch.randn(4, 4), "layer.bias": torch.randn(4)}
    save_file({"layer.weight": live["layer.weight"] * 2, "layer.bias": live["layer.bias"]}, tmp_path / "model")
    with pytest.raises(NotLearned, match="layer\\.weight is not a tensor") as raised:
        learn(tmp_path / "model", live)
    assert not raised.value.ambiguous


def test_cast_tensor_is_refused(tmp_path: Path) -> None:
    live = {"weight": torch.randn(4, 4)}
    save_file({"weight": live["weight"].to(torch.bfloat16)}, tmp_path / "model")
    with pytest.raises(NotLearned, match="weight"):
        learn(tmp_path / "model", live)


def test_renamed_tensor_that_equals_several_is_told_apart_later(tmp_path: Path) -> None:
    live = {"a.weight": torch.zeros(4), "b.weight": torch.zeros(4)}
    save_file({"x.weight": live["a.weight"], "y.weight": live["b.weight"]}, tmp_path / "model")
    with pytest.raises(NotLearned, match="several") as raised:
        learn(tmp_path / "model", live)
    assert raised.value.ambiguous
    live["a.weight"] += 1
    save_file({"x.weight": live["a.weight"], "y.weight": live["b.weight"]}, tmp_path / "model")
    assert learn(tmp_path / "model", live).names == {"a.weight", "b.weight"}


def test_equal_tensors_are_told_apart_by_those_beside_them(tmp_path: Path) -> None:
    live: dict[str, torch.Tensor] = {}
    for name in "abc":
        live |= {f"{name}.weight": torch.randn(4), f"{name}.count": torch.tensor(7)}
    saved = {f"new_{name}": tensor for name, tensor in live.items()}
    save_file(saved, tmp_path / "model")
    layout = learn(tmp_path / "model", live)
    for number, name in enumerate("abc"):
        live[f"{name}.count"].fill_(number)
    save_file({f"new_{name}": tensor for name, tensor in live.items()}, tmp_path / "later")
    sink = Collected()
    layout.write(sink, live.__getitem__)
    assert bytes(sink.data) == (tmp_path / "later").read_bytes()


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", b"\x05\0\0\0\0\0\0\0{xxxx"):
        (tmp_path / "model").write_bytes(content)
        with pytest.raises(NotLearned):
            learn(tmp_path / "model", {})
