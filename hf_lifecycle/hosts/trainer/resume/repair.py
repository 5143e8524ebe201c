"""Puts back what Trainer's loading lost, from the files that Trainer itself saved.

``save_pretrained`` renames and splits keys for many architectures, and Trainer's resume, a plain
``load_state_dict(strict=False)``, does not undo it. The model class's own ``from_pretrained`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from hf_lifecycle.state.fingerprint import is_shared_out, module_tensors
from hf_lifecycle.state.rng.states import capture_rng, restore_rng

__all__ = ["lost_by_stock_loading", "model_from_checkpoint", "unfiled_parameters"]


def model_from_checkpoint(model: torch.nn.Module, checkpoint: Path, names: Sequence[str]) -> str | None:
    """Copy the tensors ``names`` of ``model`` from ``checkpoint``. Returns why that could not be done, or None.

    The generators come out as they went in: ``from_pretrained`` draws initial values.
    """
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__qualname__} is not a PreTrainedModel, so there is no from_pretrained to repair it with"
    if any(is_shared_out(tensor) for tensor in module_tensors(model).values()):
        return "the model is sharded over the ranks, and a shard cannot be repaired"
    before = capture_rng()
    try:
        fresh = _read(model, checkpoint)
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        return f"{type(model).__qualname__}.from_pretrained({str(checkpoint)!r}) failed: {error}"
    finally:
        restore_rng(before)
    source, target = module_tensors(fresh), module_tensors(model)
    with torch.no_grad():
        for name in names:
            if name in source and name in target and source[name].shape == target[name].shape:
                target[name].copy_(source[name].to(target[name].dtype))
    return None


def _read(model: PreTrainedModel, checkpoint: Path) -> torch.nn.Module:
    # Wide enough that no dtype in the file is narrowed; each tensor is cast back to the live one's dtype.
    wide = any(tensor.dtype == torch.float64 for tensor in module_tensors(model).values())
    settings: dict[str, Any] = {
        "config": copy.deepcopy(model.config),
        "dtype": torch.float64 if wide else torch.float32,
    }
    try:
        fresh: torch.nn.Module = type(model).from_pretrained(checkpoint, **settings)
    except OSError:  # some classes' own method wants files that their save_pretrained does not write
        fresh = PreTrainedModel.from_pretrained.__func__(type(model), checkpoint, **settings)  # type: ignore[attr-defined]
    return fresh


def lost_by_stock_loading(model: torch.nn.Module, checkpoint: Path) -> list[str]:
    """The tensors of ``model`` for which ``checkpoint`` has no key of their name, so that Trainer did not load them."""
    if not isinstance(model, PreTrainedModel):
        return []
    files = sorted(checkpoint.glob("model*.safetensors"))
    if not files:
        return []
    saved: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            saved |= set(opened.keys())
    state = model.state_dict(keep_vars=True)
    loaded = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    return [name for name, tensor in state.items() if name not in saved and tensor.data_ptr() not in loaded]


def unfiled_parameters(model: torch.nn.Module) -> list[str]:
    """The names of trained parameters that the files of an adapter do not hold, such as a prompt encoder's."""
    adapters = getattr(model, "peft_config", None)
    if not adapters or any(is_shared_out(one) for one in model.parameters()):
        return []
    from peft import PeftModel, get_peft_model_state_dict

    if not isinstance(model, PeftModel):
        return []
    states = [get_peft_model_state_dict(model, adapter_name=one, save_embedding_layers=False) for one in adapters]
    filed = {tensor.data_ptr() for state in states for tensor in state.values()}
    return [name for name, one in model.named_parameters() if one.requires_grad and one.data_ptr() not in filed]
