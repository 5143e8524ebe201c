"""The order of an epoch depends on the sampler, the seed and the epoch, and moves no global generator."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hf_lifecycle.data.samplers import Ticket, TicketSampler

ROWS = range(8)


class AtEveryIndex(Sampler):
    """Draws from the three global generators for each index."""

    def __iter__(self) -> Iterator[int]:
        for _ in ROWS:
            yield (random.randrange(8) + int(np.random.randint(8)) + int(torch.randint(8, ()))) % 8

    def __len__(self) -> int:
        return len(ROWS)


class Endless(Sampler):
    """No length."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield random.randrange(8)


SAMPLERS: dict[str, Any] = {
    "random": lambda: RandomSampler(ROWS),
    "random with replacement": lambda: RandomSampler(ROWS, replacement=True, num_samples=20),
    "random, more than once": lambda: RandomSampler(ROWS, num_samples=20),
    "random, own generator": lambda: RandomSampler(ROWS, generator=torch.Generator().manual_seed(3)),
    "subset": lambda: SubsetRandomSampler(list(ROWS)),
    "weighted": lambda: WeightedRandomSampler([1.0] * 8, 8),
    "at every index": AtEveryIndex,
    "batches": lambda: BatchSampler(RandomSampler(ROWS), 3, drop_last=False),
    "batches at every index": lambda: BatchSampler(AtEveryIndex(), 3, drop_last=True),
}


def host() -> list[Any]:
    return [random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()]


def order(sampler: TicketSampler, epoch: int, *, scramble: bool = False) -> list[Any]:
    sampler.current_epoch = epoch
    indices = []
    for ticket in sampler:
        if scramble:  # what a model draws between two indices
            random.random()
            np.random.random_sample()
            torch.rand(())
        indices.append(ticket.index)
    return indices


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_epoch_has_one_order_wherever_the_global_generators_are(name: str) -> None:
    unbroken = TicketSampler(SAMPLERS[name](), seed=5)
    orders = [order(unbroken, epoch, scramble=True) for epoch in range(3)]
    resumed = TicketSampler(SAMPLERS[name](), seed=5)
    assert order(resumed, 2) == orders[2]
    assert orders[0] != orders[1]
    assert orders[1] != orders[2]


@pytest.mark.parametrize("name", SAMPLERS)
def test_drawing_an_order_moves_nothing(name: str) -> None:
    sampler = TicketSampler(SAMPLERS[name](), seed=5)
    before = host()
    for _ in sampler:
        assert host() == before
    assert host() == before


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "random, own generator"])
def test_another_seed_gives_another_order(name: str) -> None:
    assert order(TicketSampler(SAMPLERS[name](), seed=5), 0) != order(TicketSampler(SAMPLERS[name](), seed=6), 0)


def test_tickets_count_the_batches_of_their_epoch() -> None:
    sampler = TicketSampler(SequentialSampler(range(3)), seed=5)
    sampler.current_epoch = 4
    assert list(sampler) == [Ticket(4, 0, 0), Ticket(4, 1, 1), Ticket(4, 2, 2)]


def test_a_wrapped_sampler_keeps_its_kind_length_and_attributes() -> None:
    inner = BatchSampler(SequentialSampler(range(7)), 3, drop_last=True)
    sampler = TicketSampler(inner, seed=5)
    assert isinstance(sampler, BatchSampler)
    assert (len(sampler), sampler.batch_size, sampler.drop_last, sampler.sampler) == (2, 3, True, inner.sampler)
    assert not isinstance(TicketSampler(SequentialSampler(range(7)), seed=5), BatchSampler)
    with pytest.raises(AttributeError):
        _ = sampler.set_epoch
    copied = copy.copy(sampler)
    assert type(copied) is BatchSampler
    assert copied.sampler is inner.sampler


@pytest.mark.parametrize("kind", [RandomSampler, SequentialSampler, SubsetRandomSampler, AtEveryIndex])
@pytest.mark.parametrize("drop_last", [True, False])
def test_batches_passed_over_leave_the_rest_as_it_is(kind: type[Sampler], drop_last: bool) -> None:
    def tickets(passed_over: int) -> list[Ticket]:
        inner = AtEveryIndex() if kind is AtEveryIndex else kind(ROWS)  # type: ignore[call-arg]
        sampler = TicketSampler(BatchSampler(inner, 3, drop_last), seed=5)
        sampler.passed_over = sampler.skip = passed_over
        first = list(sampler)
        assert len(list(sampler)) == len(first), "the next iteration is a whole one"
        return first

    whole = tickets(0)
    for unseen in range(len(whole) + 1):
        assert len(tickets(unseen)) == len(whole)
        assert tickets(unseen)[unseen:] == whole[unseen:]


def test_a_sampler_without_length_may_be_endless() -> None:
    sampler = TicketSampler(BatchSampler(Endless(), 2, drop_last=False), seed=5)
    tickets = iter(sampler)
    first = [next(tickets).index for _ in range(20)]
    again = iter(TicketSampler(BatchSampler(Endless(), 2, drop_last=False), seed=5))
    assert [next(again).index for _ in range(20)] == first
    with pytest.raises(TypeError):
        len(sampler)


def test_a_shard_of_an_endless_sampler_may_be_taken() -> None:
    from accelerate.data_loader import BatchSamplerShard

    inner = BatchSampler(Endless(), 2, drop_last=False)
    sampler = TicketSampler(BatchSamplerShard(inner, num_processes=2, process_index=1), seed=5)
    tickets = iter(sampler)
    assert [next(tickets).number for _ in range(4)] == [0, 1, 2, 3]


def test_a_sampler_that_gives_nothing_gives_nothing() -> None:
    assert list(TicketSampler(SequentialSampler([]), seed=5)) == []


def test_a_closed_sampler_gives_nothing() -> None:
    sampler = TicketSampler(SequentialSampler(ROWS), seed=5)
    sampler.closed = True
    assert list(sampler) == []


def test_an_error_in_a_sampler_leaves_the_generators_as_they_were() -> None:
    class Broken(AtEveryIndex):
        def __iter__(self) -> Iterator[int]:
            yield random.randrange(8)
            random.random()
            raise RuntimeError("no more")

    sampler = TicketSampler(Broken(), seed=5)
    before = host()
    with pytest.raises(RuntimeError, match="no more"):
        list(sampler)
    assert host() == before


def test_an_order_left_in_its_middle_leaves_the_generators_as_they_were() -> None:
    tickets = iter(TicketSampler(AtEveryIndex(), seed=5))
    before = host()
    next(tickets)
    next(tickets)
    tickets.close()
    assert host() == before


def test_every_rank_sees_the_same_order() -> None:
    loaders = [DataLoader(ROWS, batch_size=2, shuffle=True) for _ in range(2)]
    from hf_lifecycle.data.loader import take_over

    orders = [take_over(loader, seed=5, rank=rank).sampler for rank, loader in enumerate(loaders)]
    assert order(orders[0], 0) == order(orders[1], 0)  # type: ignore[arg-type]
