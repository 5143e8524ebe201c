"""Batches are made under random numbers that their key alone decides, whatever kind of dataset makes them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, get_worker_info

from hf_lifecycle.data.datasets import IterableStream, MapStream
from hf_lifecycle.data.loader import take_over
from hf_lifecycle.data.samplers import Ticket
from hf_lifecycle.data.standing_in import Collation


class Noisy(Dataset):
    """Draws from each of the three global generators for every item."""

    def __init__(self, rows: int = 6) -> None:
        self.rows = rows
        self.difficulty = 0
        self.told: list[int] = []

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.random_sample(), torch.rand(()).item()])

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


class NoisyStream(IterableDataset):
    """The same as a stream; raises at item ``broken_at``."""

    def __init__(self, rows: int = 5, broken_at: int | None = None) -> None:
        self.rows, self.broken_at = rows, broken_at
        self.start, self.end = 0, rows

    def __iter__(self) -> Any:
        for index in range(self.start, self.end):
            if index == self.broken_at:
                random.random()
                raise RuntimeError("unreadable")
            yield torch.tensor([index, random.random(), np.random.random_sample(), torch.rand(()).item()])


def noisy_collate(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + random.random() + torch.rand(())


def host() -> list[Any]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


def test_a_ticket_gives_the_finished_batch_and_an_index_gives_the_item() -> None:
    stream = MapStream(Noisy(), torch.stack, seed=1, rank=0)
    assert stream.__getitems__(Ticket(0, 0, [1, 2])).batch.shape == (2, 4)
    assert stream[3].shape == (4,)
    assert [item[0].item() for item in stream.__getitems__([4, 5])] == [4.0, 5.0]
    assert len(stream) == 6


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 0, 0, 0), (2, 0, 0, 0)),
        ((1, 0, 0, 0), (1, 1, 0, 0)),
        ((1, 0, 0, 0), (1, 0, 1, 0)),
        ((1, 0, 0, 0), (1, 0, 0, 1)),
    ],
    ids=["seed", "epoch", "number", "rank"],
)
def test_random_numbers_differ_with_every_part_of_the_key(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    def batch(seed: int, epoch: int, number: int, rank: int) -> torch.Tensor:
        return MapStream(Noisy(), torch.stack, seed, rank).__getitems__(Ticket(epoch, number, [0])).batch

    assert torch.equal(batch(*first), batch(*first))
    assert (batch(*first)[:, 1:] != batch(*second)[:, 1:]).all()


def test_one_index_twice_in_an_epoch_gets_different_random_numbers() -> None:
    stream = MapStream(Noisy(), torch.stack, seed=1, rank=0)
    within = stream.__getitems__(Ticket(0, 0, [2, 2])).batch
    later = stream.__getitems__(Ticket(0, 1, [2, 2])).batch
    draws = torch.cat([within, later])[:, 1:].double()
    assert len({tuple(row.tolist()) for row in draws}) == 4


def test_an_error_inside_a_dataset_leaves_the_generators_as_they_were() -> None:
    class Broken(Noisy):
        def __getitem__(self, index: int) -> torch.Tensor:
            random.random()
            raise RuntimeError("unreadable")

    stream = MapStream(Broken(), torch.stack, seed=1, rank=0)
    before = host()
    with pytest.raises(RuntimeError, match="unreadable"):
        stream.__getitems__(Ticket(0, 0, [0]))
    assert host() == before
    assert not stream._scope.is_open


def test_an_error_inside_the_collation_leaves_the_generators_as_they_were() -> None:
    def broken(items: Any) -> Any:
        torch.rand(())
        raise RuntimeError("ragged")

    for dataset in (Noisy(), NoisyStream()):
        loader = DataLoader(dataset, batch_size=2, collate_fn=broken)
        takeover = take_over(loader, seed=1, rank=0)
        before = host()
        with pytest.raises(RuntimeError, match="ragged"):
            list(loader)
        assert host() == before
        assert not takeover.dataset._scope.is_open


def test_an_error_in_the_middle_of_a_stream_closes_the_scope_and_the_next_pass_is_whole() -> None:
    dataset = NoisyStream(broken_at=3)
    loader = DataLoader(dataset, batch_size=2)
    takeover = take_over(loader, seed=1, rank=0)
    before = host()
    with pytest.raises(RuntimeError, match="unreadable"):
        list(loader)
    assert host() == before
    assert not takeover.dataset._scope.is_open
    dataset.broken_at = None
    again = list(loader)
    fresh = DataLoader(NoisyStream(), batch_size=2)
    take_over(fresh, seed=1, rank=0)
    assert all(torch.equal(a, b) for a, b in zip(again, fresh, strict=True))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 5, 7])
def test_a_stream_gives_all_its_items_to_the_tail_and_moves_nothing(batch_size: int | None, drop_last: bool) -> None:
    if batch_size is None and drop_last:
        pytest.skip("torch refuses it")

    def loader() -> DataLoader:
        return DataLoader(NoisyStream(), batch_size=batch_size, drop_last=drop_last)

    stock = [batch.reshape(-1, 4)[:, 0].tolist() for batch in loader()]
    once, twice = loader(), loader()
    take_over(once, seed=1, rank=0)
    take_over(twice, seed=1, rank=0)
    before = host()
    batches = list(once)
    assert host() == before
    assert [batch.reshape(-1, 4)[:, 0].tolist() for batch in batches] == stock
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    assert all(torch.equal(a, b) for a, b in zip(batches, twice, strict=True))


def test_the_batches_of_a_stream_draw_different_numbers_its_tail_too() -> None:
    loader = DataLoader(NoisyStream(), batch_size=2, collate_fn=noisy_collate)
    takeover = take_over(loader, seed=1, rank=0)
    rows = []
    for epoch in (0, 1):
        takeover.begin_epoch(epoch)
        rows += [tuple(batch[0, 1:].tolist()) for batch in loader]
    assert len(rows) == 6
    assert len(set(rows)) == 6


def test_a_closed_stream_gives_nothing() -> None:
    loader = DataLoader(NoisyStream(), batch_size=2)
    take_over(loader, seed=1, rank=0).close()
    before = host()
    assert list(loader) == []
    assert host() == before


def test_attributes_are_those_of_the_dataset_inside() -> None:
    stream = MapStream(Noisy(), torch.stack, seed=1, rank=0)
    assert stream.rows == 6
    with pytest.raises(AttributeError, match="absent"):
        _ = stream.absent
    assert not hasattr(stream, "__array__")


@pytest.mark.parametrize("kind", [MapStream, IterableStream])
def test_an_attribute_that_is_set_reaches_the_dataset_inside(kind: Any) -> None:
    inner = Noisy() if kind is MapStream else NoisyStream()
    stream = kind(inner, torch.stack, seed=1, rank=0)
    stream.rows = 3
    stream.added = "later"
    assert inner.rows == 3
    assert inner.added == "later"
    assert stream.added == "later"


def shard_by_worker(worker: int) -> None:
    """As the documentation of torch shards a stream: through the dataset that the worker's info holds."""
    info = get_worker_info()
    share = -(-(info.dataset.end - info.dataset.start) // info.num_workers)
    start = info.dataset.start + worker * share
    info.dataset.end = min(start + share, info.dataset.end)
    info.dataset.start = start


def test_a_worker_may_shard_the_dataset_through_its_info() -> None:
    def loader() -> DataLoader:
        return DataLoader(NoisyStream(6), batch_size=2, num_workers=2, worker_init_fn=shard_by_worker)

    stock = [batch[:, 0].tolist() for batch in loader()]
    taken = loader()
    take_over(taken, seed=1, rank=0)
    assert [batch[:, 0].tolist() for batch in taken] == stock


def test_the_dataset_is_told_the_epoch_of_the_run() -> None:
    inner = Noisy()
    stream = MapStream(inner, torch.stack, seed=1, rank=0)
    stream.run_epoch = 3
    stream.set_epoch(0)
    assert inner.told == [3]
    IterableStream(NoisyStream(), torch.stack, seed=1, rank=0).set_epoch(1)  # which wants to be told nothing


def test_getitems_of_the_dataset_inside_is_used() -> None:
    class Many(Noisy):
        def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
            return [torch.tensor([float(index)] * 4) for index in indices]

    for dataset in (Many(), Subset(Many(), [0, 1, 2])):
        stream = MapStream(dataset, torch.stack, seed=1, rank=0)
        assert stream.__getitems__(Ticket(0, 0, [1, 2])).batch[:, 3].tolist() == [1.0, 2.0]


def test_a_stream_without_length_has_none() -> None:
    with pytest.raises(TypeError, match="len"):
        len(IterableStream(NoisyStream(), torch.stack, seed=1, rank=0))


def test_what_has_collated_already_is_passed_through() -> None:
    batch = object()
    assert Collation(MapStream(Noisy(), torch.stack, seed=1, rank=0))(batch) is batch
