"""Which tensors of an architecture does a stock resume lose, and does ``from_pretrained`` give them back?

Promise: every parameter and buffer is compared bit for bit after exactly the calls that Trainer makes to save and to
load weights; nothing is trained. Not seen here: what Trainer does around those calls.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers.trainer_utils import load_sharded_checkpoint

from hf_lifecycle.hosts.trainer.resume.repair import model_from_checkpoint

from .tiny_models import Architecture, build, quiet

__all__ = ["Scan", "differing", "perturb", "scan", "stock_load"]


@dataclass(frozen=True, slots=True)
class Scan:
    """What one save and load of one architecture did.

    Attributes:
        tensors: How many parameters and buffers the model has (tied ones once).
        lost: Tensors that stock loading does not give back.
        unrepaired: Of the lost ones, those that the callback's repair does not give back.
        cause: What kept the repair from being made, if anything did.
    """

    tensors: int
    lost: tuple[str, ...]
    unrepaired: tuple[str, ...]
    cause: str | None = None


def _tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Move every saved floating-point tensor off its initial value: biases and norms begin equal for every seed."""
    generator = torch.Generator().manual_seed(seed)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    left_out = frozen & set(getattr(model, "_keys_to_ignore_on_save", None) or ())  # fixed tables, such as sinusoids
    saved = model.state_dict().keys() - left_out
    with torch.no_grad():
        for name, tensor in _tensors(model):
            if name not in saved:
                continue  # recomputed by the constructor, written by no one
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator).to(tensor.dtype) / 4 + 0.25)
            elif name.endswith("num_batches_tracked"):
                tensor.add_(3)


def differing(ours: torch.nn.Module, theirs: torch.nn.Module) -> list[str]:
    """The names of parameters and buffers whose shape, dtype or bits differ."""
    others = dict(_tensors(theirs))
    return [name for name, tensor in _tensors(ours) if name not in others or not _equal(tensor, others[name])]


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))


def stock_load(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load as ``Trainer._load_from_checkpoint`` does."""
    single = checkpoint / "model.safetensors"
    if single.is_file():
        model.load_state_dict(load_file(single, device="cpu"), False)
    else:
        load_sharded_checkpoint(model, str(checkpoint), strict=False, prefer_safe=True)


def scan(architecture: Architecture, dtype: torch.dtype = torch.float32) -> Scan:
    """Save a model of ``architecture``, load it into another as Trainer does, and compare; then repair and compare.

    Raises:
        CannotBuild: There is no tiny model of it.
        Exception: Whatever ``save_pretrained`` raises.
    """
    with tempfile.TemporaryDirectory() as directory, quiet():
        checkpoint = Path(directory)
        model = build(architecture).to(dtype)
        perturb(model, seed=0)
        other = copy.deepcopy(model)
        perturb(other, seed=1)
        model.save_pretrained(checkpoint)
        stock_load(other, checkpoint)
        lost = differing(model, other)
        cause = model_from_checkpoint(other, checkpoint, lost) if lost else None
        unrepaired = differing(model, other) if lost else []
    return Scan(sum(1 for _ in _tensors(model)), tuple(lost), tuple(unrepaired), cause)
