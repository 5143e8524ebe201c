"""The loaders and models of the cases; each function makes one afresh from the case's options."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
    default_collate,
)

from ..cases.data import OwnGenerator
from ..cases.tiny import FEATURES, Regressor, Rows

__all__ = [
    "Stream",
    "augmented",
    "drop_last",
    "foreign",
    "in_order",
    "own_batches",
    "own_generator",
    "owns_generators",
    "persistent",
    "ragged",
    "random_collator",
    "roaming",
    "stream",
    "weighted",
    "with_norm",
    "with_unsaved_buffer",
]

Options = Mapping[str, Any]


def _noise() -> float:
    return random.gauss(0.0, 1.0) + float(np.random.randn()) + torch.randn(()).item()


def _workers(options: Options) -> dict[str, Any]:
    return {"num_workers": options.get("workers", 0)}


def in_order(options: Options) -> DataLoader:
    return DataLoader(Rows(), batch_size=4, **_workers(options))


def own_generator(options: Options) -> DataLoader:
    generator = torch.Generator().manual_seed(5)
    return DataLoader(Rows(), batch_size=4, shuffle=True, generator=generator, **_workers(options))


def weighted(options: Options) -> DataLoader:
    sampler = WeightedRandomSampler(torch.arange(1.0, 25.0).tolist(), 24)
    return DataLoader(Rows(), batch_size=4, sampler=sampler, **_workers(options))


class _Roaming(Sampler[int]):
    def __len__(self) -> int:
        return 24

    def __iter__(self) -> Iterator[int]:
        for _ in range(24):
            yield int(torch.randint(0, 24, ()).item())


def roaming(options: Options) -> DataLoader:
    return DataLoader(Rows(), batch_size=4, sampler=_Roaming(), **_workers(options))


def own_batches(options: Options) -> DataLoader:
    rows = Rows()
    return DataLoader(rows, batch_sampler=BatchSampler(RandomSampler(rows), 4, drop_last=False), **_workers(options))


def drop_last(options: Options) -> DataLoader:
    return DataLoader(Rows(26), batch_size=4, shuffle=True, drop_last=True, **_workers(options))


def ragged(options: Options) -> DataLoader:
    return DataLoader(Rows(26), batch_size=4, shuffle=True, **_workers(options))


def augmented(options: Options) -> DataLoader:
    return DataLoader(Rows(noise=_noise), batch_size=4, shuffle=True, **_workers(options))


def persistent(options: Options) -> DataLoader:
    return DataLoader(Rows(noise=_noise), batch_size=4, shuffle=True, persistent_workers=True, **_workers(options))


def _jitter(rows: list[Any]) -> Any:
    batch = default_collate(rows)
    batch["x"] = batch["x"] + torch.randn_like(batch["x"]) + random.random() + np.random.rand()
    return batch


def random_collator(options: Options) -> DataLoader:
    return DataLoader(Rows(), batch_size=4, shuffle=True, collate_fn=_jitter, **_workers(options))


def owns_generators(options: Options) -> DataLoader:
    return DataLoader(OwnGenerator(), batch_size=4, shuffle=True, **_workers(options))


class Stream(IterableDataset[Any]):
    """Rows with noise, shared out among the workers, without a length."""

    def __init__(self, rows: int = 24) -> None:
        self.rows = Rows(rows, noise=_noise)

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return (self.rows[index] for index in range(first, 24, step))


def stream(options: Options) -> DataLoader:
    return DataLoader(Stream(), batch_size=4, **_workers(options))


class Batches:
    """Batches in a list, in another order at each pass."""

    def __init__(self) -> None:
        rows = Rows()
        self.batches = [default_collate([rows[index] for index in range(n, n + 4)]) for n in range(0, 24, 4)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        order = random.sample(range(len(self.batches)), len(self.batches))
        for index in order:
            batch = self.batches[index]
            yield {"x": batch["x"] + torch.randn(()), "labels": batch["labels"]}


def foreign(options: Options) -> Batches:
    return Batches()


def with_norm() -> nn.Module:
    return Regressor(norm=True)


class _Counting(Regressor):
    """Has a buffer that its state_dict() leaves out, which decides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(FEATURES), persistent=False)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        if self.training and labels is not None:
            self.seen += x.detach().mean(dim=0)
        return super().forward(x + 0.01 * self.seen, labels)


def with_unsaved_buffer() -> nn.Module:
    return _Counting()
