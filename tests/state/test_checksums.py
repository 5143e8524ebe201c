"""Checksums on a device: whatever single byte changes, wherever, is seen; one copy tells all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from hf_lifecycle.state import fingerprint as module
from hf_lifecycle.state.fingerprint import FrozenDigests, checksums, tensor_digest
from hf_lifecycle.state.gathering import is_on_accelerator

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 100])
def test_every_byte_counts(dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WORDS", 16)
    tensor = torch.zeros(size, dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(dtype)
    before = checksums({"it": tensor})
    assert checksums({"it": tensor.clone()}) == before
    seen = {before["it"]}
    content = tensor.view(torch.uint8)
    for place in range(content.numel()):
        content[place] = 1
        seen.add(checksums({"it": tensor})["it"])
        content[place] = 0
    assert len(seen) == 1 + content.numel()
    assert checksums({"it": tensor}) == before


def test_order_and_views_count_and_what_has_no_plain_bytes_is_left_out() -> None:
    row = torch.arange(12.0)
    sums = checksums(
        {
            "row": row,
            "back": row.flip(0),
            "turned": row.reshape(3, 4).T,
            "offset": torch.zeros(7, dtype=torch.uint8)[1:].view(torch.uint8),
            "empty": torch.empty(0),
            "sparse": row.to_sparse(),
            "nowhere": torch.empty(3, device="meta"),
        }
    )
    assert set(sums) == {"row", "back", "turned", "offset", "empty"}
    assert len({sums["row"], sums["back"], sums["turned"]}) == 3
    assert sums["offset"] == sums["empty"] == 0


def test_frozen_tensor_on_a_device_is_digested_again_whichever_element_was_written_past_its_counter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_lifecycle.state import fingerprint

    monkeypatch.setattr(fingerprint, "is_on_accelerator", lambda tensor: True)
    assert not is_on_accelerator(torch.zeros(1))
    bank = nn.Parameter(torch.zeros(100_000), requires_grad=False)
    known, digested = FrozenDigests(), []

    def counted(tensors: Any) -> dict[str, str]:
        digested.extend(tensors)
        return {name: tensor_digest(tensor) for name, tensor in tensors.items()}

    monkeypatch.setattr(fingerprint, "tensor_digests", counted)
    first = known.frozen({"bank": bank})
    assert known.frozen({"bank": bank}) == first
    assert digested == ["bank"]
    bank.data[77_777] = 1  # a sample of 512 elements would miss it
    assert known.frozen({"bank": bank}) == {"bank": tensor_digest(bank)} != first
