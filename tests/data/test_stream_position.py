"""A stream that is entered at a place gives what would have come, without reading from its beginning."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from hf_lifecycle.data import loader as loaders

datasets = pytest.importorskip("datasets", minversion="5.2")


def rows(count: int = 23, shards: int = 3, first: int = 0) -> Any:
    table = datasets.Dataset.from_dict({"x": list(range(first, first + count))})
    return table.to_iterable_dataset(num_shards=shards)


def double(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"] * 2}


def repeat(batch: dict[str, Any]) -> dict[str, Any]:
    return {"x": [value for value in batch["x"] for _ in range(2)]}


def noise(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"] + random.random() + torch.rand(()).item()}


def noisy_batch(batch: dict[str, Any]) -> dict[str, Any]:
    return {"x": [value + random.random() for value in batch["x"]]}


def numbers(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from ({"x": 10 * shard + index} for index in range(7))


def generated() -> Any:
    return datasets.IterableDataset.from_generator(numbers, gen_kwargs={"shards": [0, 1, 2]})


def living_noise() -> Any:
    source = random.Random(3)

    def noisy(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": row["x"] + source.random()}

    return noisy


def torch_noise() -> torch.Tensor:
    return torch.rand(())


def reseeding() -> None:
    torch.manual_seed(0)


DRAWS = [random.random, np.random.random_sample, np.random.standard_normal, torch_noise, reseeding]


class Silent(IterableDataset):
    """A stream without a state."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(5))


class Own(IterableDataset):
    """A stream of the user's own with a state, shared out among workers."""

    def __init__(self, rows: int = 23) -> None:
        self.rows, self.done = rows, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        begin, self.done = self.done, 0
        for number, index in enumerate(range(first, self.rows, step)):
            if number >= begin:
                self.done = number + 1
                yield torch.tensor(float(index))
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]


class OwnWithGenerator(Own):
    """One with a living generator that its state does not hold."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()


EXACT: dict[str, Callable[[], Any]] = {
    "plain": lambda: rows().with_format("torch"),
    "shards of different lengths": lambda: datasets.concatenate_datasets([rows(3, 1), rows(17, 1)]),
    "map that draws": lambda: rows().map(noise),
    "batched map": lambda: rows().map(repeat, batched=True, batch_size=4).with_format("torch"),
    "filter and map": lambda: rows().filter(lambda row: row["x"] % 3 > 0).map(double),
    "batched twice, filtered": lambda: (
        rows().map(repeat, batched=True, batch_size=4).map(repeat, batched=True, batch_size=3).filter(lambda r: r["x"])
    ),
    "skip and take": lambda: rows().skip(2).take(17),
    "repeat": lambda: rows(8).repeat(3),
    "generator": generated,
    "generator, batched map": lambda: generated().map(repeat, batched=True, batch_size=4).with_format("torch"),
    "shards shuffled": lambda: rows().shuffle(seed=3, buffer_size=1),
    "interleaved": lambda: datasets.interleave_datasets([rows(), rows(11, 2, 100)]),
    "interleaved at random": lambda: datasets.interleave_datasets(
        [rows(), rows(17, 2, 100)], probabilities=[0.4, 0.6], seed=4
    ),
    "one rank's shards": lambda: rows(24, 4).shard(2, 1),
    "a class with a state": Own,
}


def loader(dataset: Any, workers: int = 0, **options: Any) -> Any:
    plain = DataLoader(dataset, batch_size=2, num_workers=workers, **options)
    return Accelerator(cpu=True).prepare_data_loader(plain)


def take_over(loader: Any, *, seed: int, rank: int) -> loaders.LoaderTakeover:
    takeover = loaders.take_over(loader, seed=seed, rank=rank)
    takeover.follow()
    return takeover


def plain(batch: Any) -> list[float]:
    return (batch["x"] if isinstance(batch, dict) else batch).tolist()


def unbroken(make: Callable[[], Any], workers: int, epoch: int) -> tuple[list[Any], list[Any]]:
    """All batches of an epoch, and the place after each."""
    whole = loader(make(), workers)
    takeover = take_over(whole, seed=5, rank=0)
    assert takeover.position is not None, takeover.no_position
    takeover.begin_epoch(epoch)
    takeover.position.begin(epoch)
    batches, places = [], []
    for batch in whole:
        batches.append(plain(batch))
        takeover.position.trained()
        assert takeover.position.obstacle() is None
        places.append(takeover.position.place())
    takeover.give_back()
    return batches, places


def entered(make: Callable[[], Any], workers: int, place: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """The batches after ``place``, and the place after each."""
    rest = loader(make(), workers)
    takeover = take_over(rest, seed=5, rank=0)
    takeover.begin_epoch(place["epoch"])
    rest.skip_batches = takeover.enter(place)
    assert 1 <= rest.skip_batches <= max(workers, 1)
    batches, places = [], []
    for batch in rest:
        batches.append(plain(batch))
        takeover.position.trained()
        places.append(takeover.position.place())
    takeover.give_back()
    return batches, places


def holds(make: Callable[[], Any], workers: int, epoch: int, *, step: int) -> None:
    """Every ``step``-th place of an epoch is entered exactly, and so is one that an entered run came to."""
    batches, places = unbroken(make, workers, epoch)
    assert len(batches) > 3
    for number in range(1, len(places) + 1, step):
        rest, further = entered(make, workers, places[number - 1])
        assert rest == batches[number:], number
        if rest:
            middle = len(rest) // 2
            assert entered(make, workers, further[middle])[0] == rest[middle + 1 :], number


@pytest.mark.parametrize("name", EXACT)
def test_every_place_of_a_stream_is_entered_exactly(name: str) -> None:
    holds(EXACT[name], 0, 1, step=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "workers"),
    [
        ("plain", 2),
        ("plain", 3),
        ("map that draws", 2),
        ("generator, batched map", 2),
        ("interleaved at random", 2),
        ("a class with a state", 3),
    ],
)
def test_every_place_of_a_stream_is_entered_exactly_by_workers(name: str, workers: int) -> None:
    holds(EXACT[name], workers, 1, step=5)


def test_workers_of_which_one_has_ended_go_on_in_turn() -> None:
    class Uneven(Own):
        def __iter__(self) -> Iterator[torch.Tensor]:
            info = get_worker_info()
            self.rows = 23 if info is None or info.id == 0 else 10
            return super().__iter__()

    holds(Uneven, 2, 0, step=3)


@pytest.mark.parametrize(
    ("make", "workers", "reason"),
    [
        (lambda: rows().shuffle(seed=3, buffer_size=8), 0, "shuffle buffer"),
        (lambda: rows().shuffle(seed=3, buffer_size=1), 2, "in a worker"),
        (lambda: datasets.concatenate_datasets([rows(3, 1), rows(17, 1)]), 2, "in a worker"),
        (lambda: rows().map(living_noise()), 0, "keeps state from one example to the next"),
        (lambda: rows().with_format("arrow").map(lambda table: table, batched=True), 0, "whole tables"),
        (lambda: datasets.concatenate_datasets([rows(), rows().rename_column("x", "y")], axis=1), 0, "is not known"),
        (lambda: OwnWithGenerator(), 0, "dataset.generator keeps state"),
        (lambda: Silent(), 0, "has no state_dict"),
    ],
)
def test_a_state_that_does_not_say_where_the_stream_is_is_not_relied_on(make: Any, workers: int, reason: str) -> None:
    takeover = take_over(loader(make(), workers), seed=5, rank=0)
    assert takeover.position is None
    assert reason in takeover.no_position


def test_batches_that_come_in_any_order_have_no_place() -> None:
    takeover = take_over(loader(rows(), 2, in_order=False), seed=5, rank=0)
    assert "in the order in which workers finish" in takeover.no_position


@pytest.mark.parametrize("draw", DRAWS, ids=[draw.__name__ for draw in DRAWS])
def test_a_map_of_batches_that_draws_is_noticed(draw: Callable[[], Any]) -> None:
    def noisy(batch: dict[str, Any]) -> dict[str, Any]:
        draw()
        return batch

    drawing = loader(rows().map(noisy, batched=True, batch_size=20))
    takeover = take_over(drawing, seed=5, rank=0)
    assert takeover.position is not None
    next(iter(drawing))
    takeover.position.trained()
    assert takeover.position.place() is None
    assert "random numbers were drawn" in str(takeover.position.obstacle())


def test_what_the_collation_draws_is_no_obstacle() -> None:
    def masked(items: list[Any]) -> Any:
        return torch.rand(len(items)) + random.random()

    plain = DataLoader(rows().map(repeat, batched=True), batch_size=2, collate_fn=masked)
    takeover = take_over(plain, seed=5, rank=0)
    for _ in plain:
        takeover.position.trained()
    assert takeover.position.obstacle() is None


def test_a_dataset_entered_once_begins_its_next_passes_at_their_beginning() -> None:
    dataset = rows()
    _, places = unbroken(lambda: dataset, 0, 0)
    entered(lambda: dataset, 0, places[3])
    assert [row["x"] for row in dataset] == list(range(23))


def test_what_is_remembered_is_bounded() -> None:
    whole = loader(rows(200))
    takeover = take_over(whole, seed=5, rank=0)
    for _ in whole:
        takeover.position.trained()
        assert len(takeover.position._readers[0].after) <= 4
