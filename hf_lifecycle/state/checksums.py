"""A checksum of every byte of a tensor, computed on the device where it lies.

It tells whether a tensor that nobody should write to was written to, without its bytes crossing to host memory: at the
device's memory bandwidth. Each 32-bit word is multiplied by an odd number of its own, modulo 2**32: another word
anywhere gives another product. The products are summed modulo 2**64; two sets of words that differ have one sum by
accident only. It is no digest, and stays within a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from hf_lifecycle.state.gathering import is_dense

__all__ = ["checksums"]

Key = TypeVar("Key")

_WORDS = 1 << 24  # at once: 64 MiB, and as much again for the products
_ODD = -1640531535  # 2**32 divided by the golden ratio, as a signed number: neighbours get numbers far apart


def checksums(tensors: Mapping[Key, torch.Tensor]) -> dict[Key, int]:
    """The checksum of each dense tensor; sparse and quantised ones, and those of a subclass, are left out."""
    sums: dict[torch.device, dict[Key, torch.Tensor]] = {}
    factors: dict[torch.device, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or not is_dense(tensor):
            continue
        words = _words(tensor.detach())
        longest = min(_WORDS, words.numel())
        known = factors.get(tensor.device)
        if known is None or known.numel() < longest:
            numbers = torch.arange(1, longest + 1, dtype=torch.int32, device=tensor.device)
            factors[tensor.device] = known = numbers.mul_(_ODD).bitwise_or_(1)
        sums.setdefault(tensor.device, {})[key] = _sum(words, known)
    return {
        key: number
        for found in sums.values()
        for key, number in zip(found, torch.stack(list(found.values())).tolist(), strict=True)  # one copy for a device
    }


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor as 32-bit numbers, the last one filled up with zeros."""
    bytes_ = tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    if bytes_.numel() % 4 or bytes_.data_ptr() % 4:
        bytes_ = torch.nn.functional.pad(bytes_, (0, -bytes_.numel() % 4)).clone()
    return bytes_.view(torch.int32)


def _sum(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in torch.split(words, _WORDS):
        total = total * _ODD + (piece * factors[: piece.numel()]).sum(dtype=torch.int64)
    return total
