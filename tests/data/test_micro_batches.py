"""Random numbers that belong to a micro-batch: of its number among those of all ranks, on whichever rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from hf_lifecycle.data.loader import take_over
from hf_lifecycle.data.micro_batches import MicroBatches, of_each_rank, share_out
from hf_lifecycle.state.rng.states import capture_rng, restore_rng


class Drawn(Dataset[Any]):
    """An item is its index, and what was drawn for it."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> list[float]:
        return [index, random.random(), np.random.random_sample(), float(torch.rand(())), float(torch.initial_seed())]


def batches(ranks: int, rank: int, *, elastic: bool, workers: int = 0) -> list[list[list[float]]]:
    sampler: Any = BatchSampler(SequentialSampler(range(16)), 2, drop_last=False)
    if ranks > 1:
        sampler = BatchSamplerShard(sampler, num_processes=ranks, process_index=rank)
    loader = DataLoader(Drawn(), batch_sampler=sampler, collate_fn=list, num_workers=workers)
    takeover = take_over(loader, seed=1, rank=rank)
    if elastic:
        assert share_out(takeover, ranks) is None
    return list(loader)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_all_ranks_are_those_of_one_process(ranks: int, workers: int) -> None:
    whole = batches(1, 0, elastic=True)
    shared = [batches(ranks, rank, elastic=True, workers=workers) for rank in range(ranks)]
    assert [shared[number % ranks][number // ranks] for number in range(len(whole))] == whole
    assert len({tuple(item[1:4]) for batch in whole for item in batch}) == 16


def test_an_elastic_process_makes_the_batches_that_one_which_is_alone_and_not_elastic_makes() -> None:
    assert batches(1, 0, elastic=True) == batches(1, 0, elastic=False)
    assert batches(2, 1, elastic=True) != batches(2, 1, elastic=False)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(range(8))


def test_what_every_rank_reads_by_itself_and_batches_that_are_split_are_named() -> None:
    stream = DataLoader(IterableDatasetShard(Endless(), 2, num_processes=2, process_index=1), batch_size=2)
    assert "dispatch_batches=True" in str(share_out(take_over(stream, seed=1, rank=1), 2))
    shard = BatchSamplerShard(BatchSampler(range(16), 2, drop_last=False), 2, 0, split_batches=True)
    assert "split_batches=True" in str(
        share_out(take_over(DataLoader(Drawn(), batch_sampler=shard), seed=1, rank=0), 2)
    )


def drawn() -> tuple[float, ...]:
    return random.random(), np.random.random_sample(), float(torch.rand(()))


def test_micro_batch_begins_alike_on_the_rank_that_computes_it_and_unlike_any_other() -> None:
    before = capture_rng()
    seen: dict[int, set[tuple[float, ...]]] = {}
    for ranks in (1, 2, 4):
        for number in range(8):
            MicroBatches(5, number % ranks, ranks).begin(3, number // ranks)
            seen.setdefault(number, set()).add(drawn())
    assert all(len(each) == 1 for each in seen.values())
    assert len(set.union(*seen.values())) == 8
    MicroBatches(5, 0, 4).begin_step(7)
    first = drawn()
    MicroBatches(5, 3, 4).begin_step(7)
    assert drawn() == first, "an optimizer that draws draws alike on all ranks"
    restore_rng(before)


def test_running_statistics_are_of_each_rank() -> None:
    assert of_each_rank(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))) is None
    assert of_each_rank(nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False))) is None
    assert "running statistics (BatchNorm1d)" in str(of_each_rank(nn.Sequential(nn.BatchNorm1d(2))))
