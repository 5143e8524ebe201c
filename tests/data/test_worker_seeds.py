"""What torch calls the seed of a worker is decided by the seed, the epoch, the worker and the rank alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hf_lifecycle.data.loader import LoaderTakeover, take_over

Seeds = list[list[list[int]]]  # of each batch, of each row
_at_start: list[int] = []


def init(worker: int) -> None:
    """A worker_init_fn that keeps what it finds."""
    _at_start[:] = [worker, _named(), torch.initial_seed()]


def _named() -> int:
    info = get_worker_info()
    return -1 if info is None else int(info.seed)


class Rows(Dataset):
    def __len__(self) -> int:
        return 14

    def __getitem__(self, index: int) -> torch.Tensor:
        info = get_worker_info()
        return torch.tensor([index, 0 if info is None else info.id, _named(), torch.initial_seed(), *_at_start])


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[torch.Tensor]:
        first = torch.tensor([_named(), torch.initial_seed(), *_at_start])
        for index in range(9):
            yield torch.cat([torch.tensor([index]), first])


WORKERS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "2 workers": {"num_workers": 2, "worker_init_fn": init},
    "3 workers": {"num_workers": 3, "worker_init_fn": init},
    "persistent workers": {"num_workers": 3, "worker_init_fn": init, "persistent_workers": True},
}


def run(loader: Any, epochs: Iterator[int] | range, *, skip: int = 0, seed: int = 7, rank: int = 0) -> list[Seeds]:
    """The epochs, the first without the batches that are skipped."""
    takeover, seen = take_over(loader, seed=seed, rank=rank), []
    for epoch in epochs:
        drop = takeover.begin_epoch(epoch, skip=skip)
        seen.append([batch.tolist() for batch in loader][drop:])
        skip = 0
    takeover.give_back()
    return seen


@pytest.mark.parametrize("dataset", [Rows, Stream])
@pytest.mark.parametrize("workers", WORKERS.values(), ids=WORKERS)
def test_seeds_are_the_same_however_often_a_pass_was_begun(dataset: Any, workers: dict[str, Any]) -> None:
    whole = run(DataLoader(dataset(), batch_size=2, **workers), range(3))
    assert run(DataLoader(dataset(), batch_size=2, **workers), range(1, 3)) == whole[1:]
    if dataset is Rows:
        resumed = run(DataLoader(dataset(), batch_size=2, **workers), range(1, 3), skip=4)
        assert resumed == [whole[1][4:], whole[2]]
    again = DataLoader(dataset(), batch_size=2, **workers)
    takeover: LoaderTakeover = take_over(again, seed=7, rank=0)
    for _ in range(2):  # one looks at the first batch, say a callback
        takeover.begin_epoch(1)
        batches = [batch.tolist() for batch in again]
    assert batches == whole[1]
    takeover.give_back()


def test_epochs_workers_ranks_and_runs_have_seeds_of_their_own() -> None:
    loader = DataLoader(Rows(), batch_size=2, num_workers=2)
    runs = [run(loader, range(2)), run(loader, range(2), rank=1), run(loader, range(2), seed=8)]
    named = {
        (number, epoch, row[1]): row[2]
        for number, one in enumerate(runs)
        for epoch in (0, 1)
        for row in one[epoch][0] + one[epoch][1]
    }
    assert len(set(named.values())) == 12
    for one in runs:
        assert all(row[2] == row[3] for epoch in one for batch in epoch for row in batch), (
            "torch.initial_seed() says it too"
        )


@pytest.mark.parametrize("stateful", [False, True])
def test_resumed_epoch_gives_each_batch_to_the_worker_that_made_it_under_accelerate(stateful: bool) -> None:
    from accelerate import DataLoaderConfiguration

    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=stateful))
    loader = accelerator.prepare(DataLoader(Rows(), batch_size=2, num_workers=3, worker_init_fn=init))
    (whole,) = run(loader, range(1))
    assert run(loader, range(1), skip=4) == [whole[4:]]


def test_host_that_skips_drops_what_workers_make_again() -> None:
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(DataLoader(Rows(), batch_size=2, num_workers=3, worker_init_fn=init))
    (whole,) = run(loader, range(1))
    takeover = take_over(loader, seed=7, rank=0)

    def drop(batches: int) -> None:
        accelerator.gradient_state.active_dataloader.skip_batches = batches

    for skip in (3, 4, 5):
        takeover.begin_epoch(0, skip=skip, host=drop)
        assert [batch.tolist() for batch in skip_first_batches(loader, skip)] == whole[skip:]
    takeover.give_back()
