"""Streams that are read ahead in threads: what depends on timing is reported, and what does not is exact."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.utils.data import IterableDataset

from hf_lifecycle import LifecycleCallback
from tests.field.limits import Limit
from tests.trainer.runs import Rows, Trainer, digests, new_trainer, require_same_end

RACES = Limit(
    what="Examples that are read in several threads which draw from the global generators of `random`, NumPy or torch, "
    "such as sources of `interleave_datasets()` with random `map()` functions",
    when="before training",
    line=(
        "not exact: examples are read in threads, and random numbers are drawn from the global generators of random, "
        "NumPy or torch at the same time: which example gets which number depends on timing. Draw in the data "
        "collator, or from a generator that is made from the example, such as random.Random(row['id'])"
    ),
)


def draws_late(row: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.01)  # without an end of it, training is further than the batch
    return {"x": [value + random.random() for value in row["x"]]}


def is_plain(row: dict[str, Any]) -> dict[str, Any]:
    return {"x": row["x"]}


def source(shards: int = 2) -> Any:
    rows = Rows()
    data = {name: [rows[index][name].tolist() for index in range(len(rows))] for name in rows[0]}
    return datasets.Dataset.from_dict(data).to_iterable_dataset(shards)


def mixed(*functions: Callable[..., Any] | None) -> Any:
    sources = [source() if function is None else source().map(function) for function in functions]
    mix = datasets.interleave_datasets(sources, probabilities=[0.3, 0.7], seed=5, stopping_strategy="all_exhausted")
    return mix.with_format("torch")


class ReadsAhead(IterableDataset[Any]):
    """One with a thread of its own that draws."""

    def __iter__(self) -> Iterator[Any]:
        made: queue.Queue[Any] = queue.Queue(maxsize=1)  # so that the thread lives until the last item is asked for

        def fill() -> None:
            for index in range(16):
                row = Rows()[index]
                made.put({**row, "x": row["x"] + random.random()})

        thread = threading.Thread(target=fill, daemon=True)  # a pass that is left early leaves it waiting
        thread.start()
        for _ in range(16):
            yield made.get()


class MeetsThread(IterableDataset[Any]):
    """One that draws, and while whose first item is made a thread of the package begins, as of a save or a mirror."""

    def __iter__(self) -> Iterator[Any]:
        is_over = threading.Event()
        thread = threading.Thread(target=is_over.wait, name="hf_lifecycle-save")
        thread.start()
        try:
            for index in range(16):
                row = Rows()[index]
                yield {**row, "x": row["x"] + random.random()}
        finally:
            is_over.set()
            thread.join()


def trainer(folder: Path, train: Any, outer: int = 0, **settings: Any) -> Trainer:
    made = new_trainer(folder, LifecycleCallback(), train=train, **settings)
    random.seed(outer)
    return made


@pytest.mark.parametrize("workers", [0, 1])
def test_one_source_that_draws_is_exact(workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    require_same_end(
        lambda name: trainer(tmp_path / name, mixed(None, draws_late), dataloader_num_workers=workers), step=5
    )
    assert "not exact" not in caplog.text


def test_what_a_thread_draws_is_of_the_batch_and_not_of_training(tmp_path: Path) -> None:
    ends = []
    for outer in (1, 2):
        run = trainer(tmp_path / str(outer), mixed(None, draws_late), outer)
        run.train()
        ends.append(digests(run))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: mixed(draws_late, draws_late), id="two sources"),
        pytest.param(lambda: mixed(None, draws_late).map(draws_late), id="a source and the mix"),
        pytest.param(lambda: source().map(draws_late).shuffle(seed=1, buffer_size=4), id="shards"),
        pytest.param(ReadsAhead, id="a thread of its own"),
    ],
)
def test_threads_that_draw_at_the_same_time_are_reported(
    make: Callable[[], Any], workers: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, make(), dataloader_num_workers=workers).train()
    assert RACES.is_told_in(caplog.text)
    assert caplog.text.count("depends on timing") == 1


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: mixed(is_plain, is_plain), id="sources"),
        pytest.param(lambda: mixed(is_plain, is_plain).shuffle(seed=1, buffer_size=4), id="shuffled"),
        pytest.param(lambda: source().map(draws_late), id="no threads"),
        pytest.param(lambda: source(1).map(draws_late).shuffle(seed=1, buffer_size=4), id="one shard"),
        pytest.param(MeetsThread, id="a thread of the package"),
    ],
)
def test_others_are_not_reported(make: Callable[[], Any], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, _ = require_same_end(lambda name: trainer(tmp_path / name, make()), step=5)
    assert torch.isfinite(next(run.model.parameters())).all()
    assert "not exact" not in caplog.text
