"""The elements that are looked at are those of the tensors that are there, whatever took the place of others."""

from __future__ import annotations

import pytest
import torch

from hf_lifecycle.saving.snapshots.sample import Known, Sample

OTHERS = {
    "elsewhere": ("a", torch.zeros(100)),
    "of another type": ("a", torch.zeros(100, dtype=torch.float64)),
    "larger": ("b", torch.zeros(500, dtype=torch.float64)),
    "emptied": ("b", torch.zeros(0)),
    "filled": ("none", torch.zeros(3)),
    "new": ("more", torch.zeros(9, dtype=torch.int64)),
}


@pytest.mark.parametrize("turn", [1, 2, 33])
@pytest.mark.parametrize("what", OTHERS)
def test_tensor_in_the_place_of_another_is_looked_at(what: str, turn: int) -> None:
    known = Known()
    tensors = {"a": torch.zeros(100), "b": torch.zeros(50, dtype=torch.float64), "none": torch.zeros(0)}
    Sample(tensors, 0, known)
    name, other = OTHERS[what]
    tensors = {**tensors, name: other}
    for number in range(3):
        sample = Sample(tensors, turn + number, known)
        assert sample.changed() == []
        filled = {key: one for key, one in tensors.items() if one.numel()}
        for key, one in filled.items():
            one.add_(1)
            assert key in sample.changed()
        assert set(sample.changed()) == filled.keys()


def test_sample_of_before_looks_at_what_it_was_made_of() -> None:
    known = Known()
    before, now = torch.zeros(10), torch.zeros(10)
    first = Sample({"a": before}, 0, known)
    second = Sample({"a": now}, 1, known)
    now.add_(1)
    assert (first.changed(), second.changed()) == ([], ["a"])
