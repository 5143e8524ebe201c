"""What the batches of a loader are made of: some rows and classes, taken without running a dataset's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    Subset,
    TensorDataset,
)

from hf_lifecycle.data.loader import take_over
from hf_lifecycle.data.made_of import made_of, other_parts, other_rows
from hf_lifecycle.state.fingerprint import tree_digest
from hf_lifecycle.state.rng.states import capture_rng


class _Unread(Dataset[Any]):
    """Whose rows nobody may ask for."""

    def __init__(self, first: int = 0) -> None:
        self.rows = [{"text": f"row {first + number}"} for number in range(40)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError(f"row {index} was read")


@pytest.mark.parametrize(
    ("was", "other"),
    [
        (_Unread(), _Unread(1)),
        (Subset(_Unread(), range(20)), Subset(_Unread(1), range(20))),
        (Subset(_Unread(), list(range(20))), Subset(_Unread(), list(range(1, 21)))),
        (ConcatDataset([_Unread()]), None),
        (TensorDataset(torch.arange(9)), TensorDataset(torch.arange(9) + 1)),
        ([1, 2, 3], [1, 2, 4]),
    ],
)
def test_rows_are_compared_and_neither_read_nor_drawn(was: Any, other: Any) -> None:
    before = tree_digest(capture_rng().state_dict())
    saved = {"loader 0": made_of(DataLoader(was, shuffle=True))}
    assert other_rows(saved, {"loader 0": made_of(DataLoader(was, shuffle=True))}) == []
    if other is not None:
        (told,) = other_rows(saved, {"loader 0": made_of(DataLoader(other, shuffle=True))})
        assert "other rows than when the run started (loader 0: " in told
    after = tree_digest(capture_rng().state_dict())
    assert after == before


def test_classes_are_those_of_the_parts_that_a_user_gave() -> None:
    loader = DataLoader(
        Subset(_Unread(), range(20)), batch_sampler=BatchSampler(SequentialSampler(range(20)), 4, False)
    )
    parts = made_of(loader)["parts"]
    assert parts == {
        "dataset": "Subset of _Unread",
        "sampler": "SequentialSampler",
        "batch_sampler": "BatchSampler",
        "collate_fn": "default_collate",
    }
    take_over(loader, seed=1, rank=0)
    assert made_of(loader)["parts"] == parts
    assert other_parts({"loader 0": {"rows": {}, "parts": {**parts, "sampler": "RandomSampler"}}}, {}) == []


def test_stream_that_is_dealt_out_to_processes_is_of_the_class_of_the_users() -> None:
    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("it was read")

    dealt = IterableDatasetShard(Stream(), batch_size=2, num_processes=2, process_index=1)
    for dataset in (Stream(), dealt):
        made = made_of(DataLoader(dataset, batch_size=2))
        assert made["parts"]["dataset"].endswith("Stream")
        assert " of " not in made["parts"]["dataset"]
        assert made["rows"] == {}
