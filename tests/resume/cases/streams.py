"""Cases of iterable datasets: noise, workers, generators, several passes, shuffle buffers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import Trainer

from ..harness import Attempt, Break, Case
from .tiny import NOISES, Rows, regression

__all__ = ["CASES"]


class Stream(IterableDataset):
    """The rows of :class:`Rows` one after the other, shared out among workers."""

    def __init__(self, rows: int = 64, *, noise: str | None = None) -> None:
        self.rows = Rows(rows, noise=NOISES[noise] if noise is not None else None)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        for index in range(first, len(self.rows), step):
            yield self.jitter(self.rows[index])

    def jitter(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return row


class FreshGenerator(Stream):
    """Noise from a generator that each pass makes anew."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.generator = torch.Generator().manual_seed(4)
        yield from super().__iter__()

    def jitter(self, row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**row, "x": row["x"] + torch.randn((), generator=self.generator)}


class LivingGenerator(FreshGenerator):
    """Noise from a generator that lives as long as the dataset, from pass to pass."""

    def __init__(self, rows: int = 64) -> None:
        super().__init__(rows)
        self.generator = torch.Generator().manual_seed(4)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return Stream.__iter__(self)


class ShuffledByEpoch(Stream):
    """In another order each epoch, as told by ``set_epoch``."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(self.epoch))
        for index in order.tolist():
            yield self.rows[index]


def _hub_stream(run: Attempt, *, rows: int = 64, **settings: Any) -> Trainer:
    from datasets import Dataset

    table = Rows(rows)
    columns = {"x": table.x.tolist(), "labels": table.labels.tolist()}
    stream = Dataset.from_dict(columns).to_iterable_dataset(num_shards=2).shuffle(seed=13, buffer_size=16)
    return regression(run, train=stream.with_format("torch"), **settings)


def _noisy_hub_stream(run: Attempt) -> Trainer:
    from datasets import Dataset

    table = Rows(64)
    stream = Dataset.from_dict({"x": table.x.tolist(), "labels": table.labels.tolist()}).to_iterable_dataset()

    def jitter(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": [value + NOISES["numpy"]() for value in row["x"]]}

    return regression(run, train=stream.map(jitter).with_format("torch"))


def _case(name: str, about: str, make: Any, *, core: bool = False, **settings: Any) -> Case:
    return Case(name, about, lambda run: regression(run, train=make(), **settings), core=core)


# A stream of 20 rows has 5 steps, so that a break at step 10 falls into its second pass and step 12 into its third.
SHORT = 20

CASES = (
    _case("stream", "an iterable dataset", Stream),
    _case("stream_noise", "with noise from the global generator", lambda: Stream(noise="torch"), core=True),
    _case(
        "stream_noise_2",
        "the same, distributed to 2 workers",
        lambda: Stream(noise="python"),
        dataloader_num_workers=2,
        core=True,
    ),
    _case("stream_fresh_generator", "a generator made at each pass", FreshGenerator),
    _case("stream_living_generator", "a generator that lives on the dataset", LivingGenerator),
    _case("stream_living_generator_2", "the same, in 2 workers", LivingGenerator, dataloader_num_workers=2),
    _case("stream_passes", "several passes over a short stream", lambda: Stream(SHORT), core=True),
    _case("stream_passes_noise", "the same with noise", lambda: Stream(SHORT, noise="numpy")),
    _case("stream_passes_2", "the same in 2 workers", lambda: Stream(SHORT, noise="numpy"), dataloader_num_workers=2),
    _case("stream_passes_epochs", "several passes, shuffled by set_epoch", lambda: ShuffledByEpoch(SHORT)),
    _case("stream_passes_generator", "several passes, a living generator", lambda: LivingGenerator(SHORT)),
    _case(
        "stream_accumulation", "a stream with gradient accumulation", lambda: Stream(96), gradient_accumulation_steps=2
    ),
    _case(
        "stream_not_dispatched",
        "dispatch_batches=False",
        lambda: Stream(noise="torch"),
        accelerator_config={"dispatch_batches": False},
    ),
    Case("stream_buffer", "a datasets stream with a shuffle buffer", _hub_stream, needs=("datasets",)),
    Case(
        "stream_buffer_2",
        "the same in 2 workers",
        lambda run: _hub_stream(run, dataloader_num_workers=2),
        needs=("datasets",),
    ),
    Case(
        "stream_buffer_passes",
        "the same over several passes",
        lambda run: _hub_stream(run, rows=SHORT),
        needs=("datasets",),
    ),
    Case("stream_map", "a datasets stream with a map that draws", _noisy_hub_stream, needs=("datasets",)),
    _case(
        "stream_accumulation_ragged",
        "several passes, gradient accumulation with a ragged last step",
        lambda: Stream(SHORT, noise="python"),
        gradient_accumulation_steps=2,
    ),
    _case("stream_ragged_batch", "several passes with a smaller last batch", lambda: Stream(SHORT + 2, noise="python")),
    Case(
        "stream_pass_edge",
        "interrupted after a save at the very end of a pass",
        lambda run: regression(run, train=Stream(SHORT, noise="torch"), save_steps=5),
        breaks=(Break(6),),
    ),
)
