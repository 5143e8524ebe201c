"""Small tensors of an accelerator in host memory, by one copy for all of an element type.

A copy to host memory waits for everything that the device was asked for before, and costs some ten microseconds
beside: of hundreds of biases, norms, step counts and samples, one after the other, that is what a save costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

__all__ = ["gathered", "is_dense", "is_on_accelerator"]

Key = TypeVar("Key")

_SMALL = 1 << 20  # bytes of a tensor; one that is larger is worth a copy of its own


def is_on_accelerator(tensor: torch.Tensor) -> bool:
    """Whether to read it is to wait for a device."""
    return tensor.device.type not in ("cpu", "meta")


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether it holds its elements, each of them, as plain numbers in memory."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_meta)


def gathered(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, torch.Tensor]:
    """Copies in host memory of those that are small, dense and on an accelerator.

    Args:
        tensors: Any tensors. Those that are distributed are left out, as are those in host memory and large ones.

    Returns:
        The copies, under the same keys; they are parts of one piece of memory.
    """
    groups: dict[tuple[torch.dtype, torch.device], dict[Key, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        is_plain = is_on_accelerator(tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        if is_plain and is_dense(tensor) and tensor.numel() * tensor.element_size() <= _SMALL:
            groups.setdefault((tensor.dtype, tensor.device), {})[key] = tensor.detach().resolve_conj().resolve_neg()
    found: dict[Key, torch.Tensor] = {}
    for group in groups.values():
        together = torch.cat([one.reshape(-1) for one in group.values()]).to("cpu")
        pieces = torch.split_with_sizes(together, [one.numel() for one in group.values()])
        found |= {key: piece.reshape(group[key].shape) for key, piece in zip(group, pieces, strict=True)}
    return found
