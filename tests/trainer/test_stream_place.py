"""A resumed stream is not read from its beginning where the state of its dataset is exact, and ends the same anyway."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer

from hf_lifecycle import LifecycleCallback

from .runs import break_off, digests, new_trainer

datasets = pytest.importorskip("datasets", minversion="5.2")

ROWS = 48  # a pass is 12 batches of 4


class Reads:
    """Counts the rows that any process reads: one line in a file for each."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        with self.file.open("a") as lines:
            lines.write(f"{row['row']}\n")
        x = torch.randn(4, generator=torch.Generator().manual_seed(int(row["row"])))
        return {"x": x.tolist(), "labels": x.sum().item()}

    def rows(self) -> list[int]:
        return [int(line) for line in self.file.read_text().splitlines()]


def numbered(reads: Reads, shards: int = 4) -> Any:
    table = datasets.Dataset.from_dict({"row": list(range(ROWS))})
    return table.to_iterable_dataset(num_shards=shards).map(reads, remove_columns=["row"])


def plain(reads: Reads) -> Any:
    return numbered(reads).with_format("torch")


def drawing(reads: Reads) -> Any:
    """Noise for each row; and the model is trained on it."""
    return numbered(reads).map(lambda row: {"labels": row["labels"] + random.random()}).with_format("torch")


def drawing_in_batches(reads: Reads) -> Any:
    def noise(rows: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [label + random.random() for label in rows["labels"]]}

    return numbered(reads).map(noise, batched=True, batch_size=10).with_format("torch")


def in_batches(reads: Reads) -> Any:
    def double(rows: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [2 * label for label in rows["labels"]]}

    return numbered(reads).map(double, batched=True, batch_size=10).with_format("torch")


def buffered(reads: Reads) -> Any:
    return numbered(reads).shuffle(seed=1, buffer_size=8).with_format("torch")


class Own(IterableDataset):
    """A stream of the user's own with a state."""

    def __init__(self, reads: Reads) -> None:
        self.reads, self.given = reads, 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        begin, self.given = self.given, 0
        for row in range(begin, ROWS):
            self.given = row + 1
            yield {name: torch.tensor(value) for name, value in self.reads({"row": row}).items()}

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.given = state["given"]


class OwnWithObject(Own):
    """One whose state no file of ours can hold."""

    def state_dict(self) -> dict[str, Any]:
        return {"given": self.given, "lock": object()}


def run(folder: Path, make: Callable[[Reads], Any], *, strict: bool = True, **settings: Any) -> tuple[Trainer, Reads]:
    reads = Reads(folder.with_suffix(f".{len(list(folder.parent.iterdir()))}"))
    settings = {"max_steps": 10, **settings}
    trainer = new_trainer(folder, LifecycleCallback(strict=strict), train=make(reads), **settings)
    return trainer, reads


def resumed_run(
    tmp_path: Path, make: Callable[[Reads], Any], *, step: int = 6, first: dict[str, Any] | None = None, **settings: Any
) -> Reads:
    """Train unbroken, and broken off after ``step``; both must end the same. What the resumed run read."""
    whole, _ = run(tmp_path / "whole", make, **settings)
    whole.train()
    broken, _ = run(tmp_path / "broken", make, **{**settings, **(first or {})})
    break_off(broken, step=step)
    resumed, reads = run(tmp_path / "broken", make, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)
    return reads


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith("stream: ")]


@pytest.fixture(autouse=True)
def _heard(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="hf_lifecycle")


@pytest.mark.parametrize("make", [plain, drawing, Own])
def test_a_resumed_stream_reads_what_is_left_and_one_batch(
    tmp_path: Path, make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    reads = resumed_run(tmp_path, make)
    # Trained on: batches 6 to 9. Read: the one before, those, and the one that the loader is ahead.
    assert reads.rows() == list(range(20, 44))
    assert said(caplog) == ["stream: continues from the state of its dataset; 1 batches are read again instead of 6"]


def test_a_map_of_batches_reads_from_its_last_edge(tmp_path: Path) -> None:
    assert resumed_run(tmp_path, in_batches).rows() == list(range(10, 48))


def test_a_stream_in_its_second_pass_goes_on_there(tmp_path: Path) -> None:
    reads = resumed_run(tmp_path, plain, max_steps=18, step=16)
    assert len(reads.rows()) == 4 * (1 + 2 + 1)


def test_accumulated_batches_are_counted_one_by_one(tmp_path: Path) -> None:
    reads = resumed_run(tmp_path, plain, step=4, max_steps=5, gradient_accumulation_steps=2)
    assert reads.rows() == list(range(28, 44))


def test_a_run_broken_off_twice_goes_on_by_state_twice(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", plain)
    whole.train()
    break_off(run(tmp_path / "broken", plain)[0], step=4)
    break_off(run(tmp_path / "broken", plain)[0], step=6, resume=True)
    resumed, reads = run(tmp_path / "broken", plain)
    resumed.train(resume_from_checkpoint=True)
    assert digests(resumed) == digests(whole)
    assert reads.rows() == list(range(20, 44))


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize("make", [plain, drawing])
def test_workers_read_what_is_left_and_their_last_batches(tmp_path: Path, make: Any, step: int) -> None:
    reads = resumed_run(tmp_path, make, step=step, save_steps=1, dataloader_num_workers=2)
    # Worker 0 reads the first and third shard of 12 rows, worker 1 the others; each made half of the batches.
    again = set(reads.rows())
    assert again.isdisjoint(range(4 * (step // 2 - 1)))
    assert again.isdisjoint(range(12, 12 + 4 * (step // 2 - 1)))


@pytest.mark.parametrize(
    ("make", "settings", "reason"),
    [
        (buffered, {}, "the content of its shuffle buffer is not part of its state"),
        (drawing_in_batches, {}, "random numbers were drawn while examples were read"),
        (OwnWithObject, {}, "cannot be stored safely"),
    ],
)
def test_what_its_state_cannot_restore_is_read_again_and_said(
    tmp_path: Path, make: Any, settings: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    reads = resumed_run(tmp_path, make, **settings)
    assert len(reads.rows()) >= 44
    (line,) = said(caplog)
    assert line.startswith("stream: 6 batches are read again to reach the saved position: ")
    assert reason in line


@pytest.mark.slow
def test_another_number_of_workers_reads_from_the_beginning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    break_off(run(tmp_path / "run", plain, dataloader_num_workers=2)[0], step=6)
    resumed, reads = run(tmp_path / "run", plain, strict=False)
    resumed.train(resume_from_checkpoint=True)
    assert reads.rows() == list(range(44))
    assert "it was read by 2 workers, and now by 0" in said(caplog)[0]
