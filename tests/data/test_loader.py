"""A loader taken over: the same batches for any way of making them, and all of it given back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    get_worker_info,
)

from hf_lifecycle.data.loader import obstacle, take_over


class Noisy(Dataset):
    """Rows with noise from every global generator."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.random_sample(), torch.rand(()).item()])


class NoisyStream(IterableDataset):
    """The same as a stream, shared out among workers."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, 8, step):
            yield Noisy()[index]


class Epochs(Dataset):
    """Rows that say which epoch the dataset was last told."""

    def __init__(self) -> None:
        self.epoch = -1

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return self.epoch

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def host() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


def run(loader: Any, epoch: int, *, skip: int = 0, seed: int = 5) -> list[Any]:
    """The batches of an epoch of a loader taken over and given back; the global generators must not move."""
    takeover = take_over(loader, seed=seed, rank=0)
    takeover.begin_epoch(epoch)
    before = host()
    batches = [batch.tolist() for batch in (skip_first_batches(loader, skip) if skip else loader)]
    assert host() == before
    takeover.give_back()
    return batches


MAKERS: dict[str, Any] = {
    "no workers": {},
    "2 workers": {"num_workers": 2},
    "3 workers, far ahead": {"num_workers": 3, "prefetch_factor": 4},
    "persistent workers": {"num_workers": 2, "persistent_workers": True},
    "forkserver": {"num_workers": 1, "multiprocessing_context": "forkserver"},
    "spawn": {"num_workers": 1, "multiprocessing_context": "spawn"},
}


@pytest.mark.parametrize("name", MAKERS)
def test_batches_are_the_same_whoever_makes_them(name: str) -> None:
    expected = run(DataLoader(Noisy(), batch_size=3, shuffle=True), 1)
    loader = DataLoader(Noisy(), batch_size=3, shuffle=True, **MAKERS[name])
    assert run(loader, 1) == expected


@pytest.mark.parametrize("name", ["2 workers", "persistent workers", "spawn"])
def test_a_stream_gives_the_same_batches_for_the_same_number_of_workers(name: str) -> None:
    options = MAKERS[name]
    expected = run(DataLoader(NoisyStream(), batch_size=3, num_workers=options["num_workers"]), 1)
    assert run(DataLoader(NoisyStream(), batch_size=3, **options), 1) == expected
    rows = [tuple(row[1:]) for batch in expected for row in batch]
    assert len(set(rows)) == 8


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dataset", [Noisy, NoisyStream])
def test_what_is_left_after_skipping_is_what_would_have_come(dataset: Any, workers: int) -> None:
    prepared = [
        Accelerator(cpu=True).prepare_data_loader(
            DataLoader(dataset(), batch_size=2, shuffle=dataset is Noisy, num_workers=workers)
        )
        for _ in range(2)
    ]
    assert run(prepared[1], 2, skip=2) == run(prepared[0], 2)[2:]


def test_a_batch_sampler_of_the_users_own_decides_the_batches() -> None:
    class Pairs:
        def __iter__(self) -> Iterator[list[int]]:
            for _ in range(3):
                yield [random.randrange(8), random.randrange(8)]

        def __len__(self) -> int:
            return 3

    batches = run(DataLoader(Noisy(), batch_sampler=Pairs()), 0)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert run(DataLoader(Noisy(), batch_sampler=Pairs(), num_workers=2), 0) == batches


def test_a_loader_without_batches_gives_items() -> None:
    def loader(**options: Any) -> DataLoader:
        return DataLoader(Noisy(), batch_size=None, sampler=RandomSampler(range(8)), **options)

    items = run(loader(), 0)
    assert len(items) == 8
    assert sorted(item[0] for item in items) == list(range(8))
    assert run(loader(num_workers=2), 0) == items


def test_a_batch_sampler_given_as_sampler_gives_batches() -> None:
    class Many(Noisy):
        def __getitem__(self, index: Any) -> torch.Tensor:
            return torch.stack([Noisy.__getitem__(self, each) for each in index])

    def loader(**options: Any) -> DataLoader:
        sampler = BatchSampler(RandomSampler(range(8)), 3, drop_last=False)
        return DataLoader(Many(), batch_size=None, sampler=sampler, **options)

    batches = run(loader(), 0)
    assert [len(batch) for batch in batches] == [3, 3, 2]
    assert run(loader(num_workers=2), 0) == batches


def test_persistent_workers_see_each_new_epoch() -> None:
    loader = DataLoader(Epochs(), batch_size=2, num_workers=1, persistent_workers=True)
    takeover = take_over(loader, seed=5, rank=0)
    seen = []
    for epoch in range(3):
        takeover.begin_epoch(epoch)
        takeover.dataset.set_epoch(epoch)
        seen += [batch.tolist() for batch in loader]
    takeover.give_back()
    assert seen == [[0, 0], [0, 0], [1, 1], [1, 1], [2, 2], [2, 2]]


ATTRIBUTES = ("dataset", "collate_fn", "generator", "sampler", "batch_sampler", "worker_init_fn", "batch_size")


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(Noisy(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)),
        lambda: DataLoader(Noisy(), batch_size=None),
        lambda: DataLoader(NoisyStream(), batch_size=2),
        lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(range(8)), 2, drop_last=True)),
    ],
    ids=["batches", "items", "stream", "batch sampler"],
)
@pytest.mark.parametrize("interrupted", [0, 1, 2])
def test_all_is_given_back_after_interrupted_takeovers_too(make: Any, interrupted: int) -> None:
    loader = make()
    before = {name: getattr(loader, name) for name in ATTRIBUTES}
    for _ in range(interrupted):
        take_over(loader, seed=1, rank=0)
    takeover = take_over(loader, seed=1, rank=0)
    assert takeover.dataset.inner is before["dataset"]
    assert takeover.dataset.inner_collate is before["collate_fn"]
    takeover.give_back()
    assert all(getattr(loader, name) is value for name, value in before.items())


def test_persistent_workers_give_the_batches_of_whoever_has_the_loader() -> None:
    loader = DataLoader(Epochs(), batch_size=2, num_workers=1, persistent_workers=True)
    assert [batch.tolist() for batch in loader] == [[-1, -1], [-1, -1]]
    takeover = take_over(loader, seed=1, rank=0)
    takeover.begin_epoch(3)
    takeover.dataset.set_epoch(3)
    assert [batch.tolist() for batch in loader] == [[3, 3], [3, 3]]
    takeover.give_back()
    assert [batch.tolist() for batch in loader] == [[3, 3], [3, 3]]


def test_giving_back_twice_changes_nothing() -> None:
    loader = DataLoader(Noisy(), batch_size=2)
    takeover = take_over(loader, seed=1, rank=0)
    takeover.give_back()
    before = {name: getattr(loader, name) for name in ATTRIBUTES}
    takeover.give_back()
    assert all(getattr(loader, name) is value for name, value in before.items())


def test_the_loader_that_accelerate_made_is_taken_over_inside() -> None:
    prepared = Accelerator(cpu=True).prepare_data_loader(DataLoader(Noisy(), batch_size=2, shuffle=True))
    inner = prepared.dataset
    takeover = take_over(prepared, seed=1, rank=0)
    assert prepared.dataset is takeover.dataset
    assert (len(prepared), prepared.total_batch_size, prepared.total_dataset_length) == (4, 2, 8)
    takeover.give_back()
    assert prepared.dataset is inner


def test_a_closed_loader_gives_no_batches() -> None:
    for dataset in (Noisy(), NoisyStream()):
        loader = DataLoader(dataset, batch_size=2)
        take_over(loader, seed=1, rank=0).close()
        assert list(loader) == []


class Own(DataLoader):
    """A loader that iterates in its own way."""

    def __iter__(self) -> Any:
        return iter([1])


def test_a_loader_that_cannot_be_taken_over_is_named_with_the_reason() -> None:
    assert obstacle(DataLoader(Noisy())) is None
    assert obstacle(Accelerator(cpu=True).prepare_data_loader(DataLoader(Noisy()))) is None
    assert "not a torch DataLoader" in str(obstacle([1, 2]))
    assert "overrides __iter__" in str(obstacle(Own(Noisy())))
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    assert "StatefulDataLoader" in str(obstacle(torchdata.StatefulDataLoader(Noisy())))


class Padding:
    """A collator with a setting."""

    width = 1

    def __call__(self, rows: list[Any]) -> Any:
        return torch.tensor(rows) * self.width


@pytest.mark.parametrize("maker", ["no workers", "2 workers", "spawn"])
def test_parts_of_a_loader_look_like_those_of_the_user(maker: str) -> None:
    rows, padding = Epochs(), Padding()
    loader = DataLoader(rows, batch_size=2, collate_fn=padding, **MAKERS[maker])
    takeover = take_over(loader, seed=5, rank=0)
    assert isinstance(loader.dataset, Epochs)
    assert isinstance(loader.collate_fn, Padding)
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert not isinstance(loader.batch_sampler, SequentialSampler)
    loader.dataset.epoch = 3
    loader.collate_fn.width = 2
    takeover.begin_epoch(0)
    assert [batch.tolist() for batch in loader] == [[6, 6], [6, 6]]
    assert (rows.epoch, padding.width) == (3, 2)
    takeover.give_back()
    assert (loader.dataset, loader.collate_fn) == (rows, padding)
