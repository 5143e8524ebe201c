"""Generators of the user's own: found, and made to depend on the batch or the epoch."""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, Subset

from hf_lifecycle.data.generators import OwnedGenerators, find_generators
from hf_lifecycle.data.loader import take_over

KINDS: dict[str, Any] = {
    "torch": lambda seed: torch.Generator().manual_seed(seed),
    "numpy": lambda seed: np.random.default_rng(seed),
    "philox": lambda seed: np.random.Generator(np.random.Philox(seed)),
    "numpy, legacy": lambda seed: np.random.RandomState(seed),
    "python": random.Random,
}


def draw(generator: Any) -> float:
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random() if hasattr(generator, "random") else generator.random_sample())


class Owner(Dataset):
    """A dataset with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> float:
        return draw(self.rng)


class OwningStream(IterableDataset):
    """A stream with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __iter__(self) -> Any:
        for _ in range(6):
            yield draw(self.rng)


class OwningSampler(Sampler):
    """A sampler with a generator of its own."""

    def __init__(self, generator: Any) -> None:
        self.rng = generator

    def __iter__(self) -> Any:
        return iter(sorted(range(6), key=lambda _: draw(self.rng)))

    def __len__(self) -> int:
        return 6


class Transform:
    """Something that a dataset holds."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __call__(self, items: list[Any]) -> torch.Tensor:
        return torch.tensor(items)

    def collate(self, items: list[Any]) -> torch.Tensor:
        return torch.tensor(items) + draw(self.generator)


def collate(items: list[Any], rng: Any) -> torch.Tensor:
    return torch.tensor(items) + draw(rng)


def epochs(loader: DataLoader, numbers: list[int]) -> list[list[list[float]]]:
    takeover = take_over(loader, seed=5, rank=0)
    found = []
    for epoch in numbers:
        takeover.begin_epoch(epoch)
        found.append([batch.tolist() for batch in loader])
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [Owner, OwningStream])
def test_a_resumed_epoch_draws_what_the_unbroken_run_drew(kind: str, make: Any) -> None:
    unbroken = epochs(DataLoader(make(KINDS[kind](1)), batch_size=2), [0, 1, 2])
    resumed = epochs(DataLoader(make(KINDS[kind](1)), batch_size=2), [2])
    assert resumed[0] == unbroken[2]
    assert unbroken[0] != unbroken[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_sampler_with_a_generator_gives_a_resumed_epoch_its_order(kind: str) -> None:
    def loader() -> DataLoader:
        return DataLoader(list(range(6)), batch_size=2, sampler=OwningSampler(KINDS[kind](1)))

    unbroken = epochs(loader(), [0, 1, 2])
    assert epochs(loader(), [2])[0] == unbroken[2]
    assert unbroken[1] != unbroken[2]


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_first_epoch_a_stream_draws_what_it_would_have_drawn(kind: str) -> None:
    stock = [batch.tolist() for batch in DataLoader(OwningStream(KINDS[kind](1)), batch_size=2)]
    assert epochs(DataLoader(OwningStream(KINDS[kind](1)), batch_size=2), [0])[0] == stock


@pytest.mark.parametrize("kind", KINDS)
def test_two_generators_of_one_batch_draw_different_numbers(kind: str) -> None:
    pair = {"a": KINDS[kind](1), "b": KINDS[kind](1)}
    OwnedGenerators(root=pair).begin_batch((1 << 128) - 1)
    assert draw(pair["a"]) != draw(pair["b"])


def test_another_seed_of_the_users_own_makes_other_epochs() -> None:
    one, two = (epochs(DataLoader(OwningStream(random.Random(seed)), batch_size=2), [1]) for seed in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    "root",
    [
        Owner(random.Random(1)),
        Subset(Owner(random.Random(1)), [0]),
        ConcatDataset([Subset(Owner(random.Random(1)), [0])]),
        {"transforms": [Transform(random.Random(1))]},
        Transform(random.Random(1)).collate,
        functools.partial(collate, rng=random.Random(1)),
        functools.partial(Transform(random.Random(1)).collate),
    ],
    ids=["attribute", "subset", "concat", "containers", "bound method", "partial", "partial of a method"],
)
def test_a_generator_is_found_where_users_put_it(root: Any) -> None:
    assert len(find_generators(root, "root")) == 1


def test_names_say_where_a_generator_is() -> None:
    owned = OwnedGenerators(dataset=Subset(Owner(random.Random(1)), [0]), collate_fn=Transform(random.Random(2)))
    assert owned.names() == ["dataset.dataset.rng", "collate_fn.generator"]


@pytest.mark.parametrize(
    "everyones",
    [
        random,
        np.random,
        np,
        random.random,
        random._inst,
        np.random.mtrand._rand,
        np.random.rand,
        torch.default_generator,
    ],
    ids=["random", "np.random", "np", "random.random", "random._inst", "np._rand", "np.random.rand", "torch"],
)
def test_the_global_generators_belong_to_no_one(everyones: Any) -> None:
    assert find_generators(Owner(everyones), "dataset") == {}


@pytest.mark.parametrize("module", [random, np.random], ids=["random", "numpy"])
def test_a_stream_that_holds_a_global_generator_is_resumed_all_the_same(module: Any) -> None:
    unbroken = epochs(DataLoader(OwningStream(module), batch_size=2), [0, 1])
    assert epochs(DataLoader(OwningStream(module), batch_size=2), [1])[0] == unbroken[1]


@pytest.mark.parametrize("module", [random, np.random], ids=["random", "numpy"])
def test_a_sampler_that_holds_a_global_generator_is_resumed_all_the_same(module: Any) -> None:
    def loader() -> DataLoader:
        return DataLoader(list(range(6)), batch_size=2, sampler=OwningSampler(module))

    unbroken = epochs(loader(), [0, 1])
    assert epochs(loader(), [1])[0] == unbroken[1]


def test_objects_that_hold_each_other_are_looked_at_once() -> None:
    one, two = Transform(None), Transform(random.Random(1))
    one.other, two.other = two, one  # type: ignore[attr-defined]
    assert list(find_generators(one, "one")) == ["one.other.generator"]


def test_large_containers_and_tensors_are_data_and_not_searched() -> None:
    assert find_generators({"rows": [random.Random(1)] * 65, "x": torch.ones(3)}, "root") == {}


def mlm(seed: int | None) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[PAD]", "[MASK]", "[UNK]", *"abcdefgh"])}))
    tokens = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", mask_token="[MASK]", unk_token="[UNK]")
    return DataCollatorForLanguageModeling(tokens, mlm_probability=0.5, seed=seed)


ROWS = [{"input_ids": [3 + (row + place) % 8 for place in range(8)]} for row in range(6)]


def masked(loader: DataLoader, epoch: int) -> list[Any]:
    takeover = take_over(loader, seed=5, rank=0)
    takeover.begin_epoch(epoch)
    return [batch["input_ids"].tolist() for batch in loader]


@pytest.mark.parametrize("seed", [None, 11])
def test_the_masks_of_a_batch_are_the_same_for_any_number_of_workers(seed: int | None) -> None:
    batches = [
        masked(DataLoader(ROWS, batch_size=2, collate_fn=mlm(seed), num_workers=workers), 1) for workers in (0, 2)
    ]
    assert batches[0] == batches[1]
    assert masked(DataLoader(ROWS, batch_size=2, collate_fn=mlm(seed)), 0) != batches[0]


def test_the_generator_of_a_collator_that_makes_it_later_is_named() -> None:
    takeover = take_over(DataLoader(ROWS, batch_size=2, collate_fn=mlm(11)), seed=5, rank=0)
    assert takeover.dataset.owned_generators() == ["collate_fn.generator"]


def test_naming_a_collators_generator_does_not_make_it() -> None:
    """In a process that is no data worker and not the main one, only its workers could make it."""

    class Seeded:
        seed = 3
        generator: torch.Generator | None = None

        def create_rng(self) -> None:
            raise ValueError("Worker process information is not available")

    assert OwnedGenerators(collate_fn=Seeded()).names() == ["collate_fn.generator"]
