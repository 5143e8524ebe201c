"""What a resumed custom loop makes or does again at the top of an epoch: loaders are found, changes are named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset

from hf_lifecycle import TrainingStateManager
from tests.field.limits import Limit
from tests.resume.harness import BrokenOff, forget_last_attempt

AGAIN = Limit(
    "weights or settings of an optimizer that the program changes at the top of each epoch, in a loop resumed in one",
    "at the resume",
    "not exact: the program changes … between resume() and the rest of the epoch, although the checkpoint already "
    "contains that change; make a change at the start of each epoch only if manager.progress.batch is 0",
)
OTHER = Limit(
    "a loop that is resumed within a pass and that goes through another loader, such as one of `skip_first_batches`",
    "at the resume",
    "not exact: the checkpoint was saved in the loop over …, and … is iterated first now: batches() continues at the "
    "saved batch by itself, so do not use skip_first_batches; a loader that is created again in each epoch needs a "
    "name=",
)
WORKERS = Limit(
    "a dataset that the program changes between epochs, with `persistent_workers=True`",
    "at the end",
    "not exact: … changes during training, but persistent data workers keep its value from when they were started, "
    "and a resumed run starts them with the present value; use persistent_workers=False",
)


class Rows(Dataset[torch.Tensor]):
    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(self.first + index)])


class Training:
    def __init__(self, folder: Path, loader: Any = None) -> None:
        forget_last_attempt()
        set_seed(5)
        self.accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        loader = loader or DataLoader(Rows(), 2, shuffle=True)
        self.model, self.optimizer, self.loader = self.accelerator.prepare(model, optimizer, loader)
        self.manager = TrainingStateManager(self.accelerator, folder, signals=())
        self.manager.resume()
        self.seen: list[list[float]] = []  # it is carried: it belongs to an object that holds the model

    def step(self, batch: torch.Tensor) -> None:
        self.accelerator.backward(self.model(batch).mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seen.append([*batch.flatten().tolist(), self.model.weight.item()])
        if self.manager.progress.step % 2 == 0:
            self.manager.save()


Epoch = Callable[[Training, int], Any]


def run(folder: Path, epoch: Epoch, break_at: int = 0, loader: Any = None) -> list[list[float]]:
    """Three epochs of six batches from what ``epoch`` gives: what was trained on, and the weights."""
    training = Training(folder, loader)
    for number in training.manager.epochs(3):
        for batch in epoch(training, number):
            training.step(batch)
            if len(training.seen) == break_at:
                training.manager.close()
                raise BrokenOff
    training.manager.close()
    return training.seen


def swapped(training: Training, number: int) -> Any:
    loader = training.accelerator.prepare(DataLoader(Rows(100 * number), 2, shuffle=True))
    return training.manager.batches(loader)


def swapped_unprepared(training: Training, number: int) -> Any:
    return training.manager.batches(DataLoader(Rows(100 * number), 2, shuffle=True))


def two_swapped(training: Training, number: int) -> Any:
    first, second = (DataLoader(Rows(100 * (number + more)), 4, shuffle=True) for more in (0, 5))
    yield from training.manager.batches(training.accelerator.prepare(first))
    yield from training.manager.batches(second)


def one_kept_one_swapped(training: Training, number: int) -> Any:
    if not hasattr(training, "kept"):
        training.kept = training.accelerator.prepare(DataLoader(Rows(7), 4, shuffle=True))  # type: ignore[attr-defined]
    yield from training.manager.batches(training.kept)  # type: ignore[attr-defined]
    yield from training.manager.batches(training.accelerator.prepare(DataLoader(Rows(100 * number), 4, shuffle=True)))


@pytest.mark.parametrize("break_at", [3, 8, 10, 15])
@pytest.mark.parametrize("epoch", [swapped, swapped_unprepared, two_swapped, one_kept_one_swapped])
def test_loader_that_is_made_in_each_epoch_goes_on(
    epoch: Epoch, break_at: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = run(tmp_path / "whole", epoch)
    with pytest.raises(BrokenOff):
        run(tmp_path / "broken", epoch, break_at)
    assert run(tmp_path / "broken", epoch) == whole
    assert "exact" not in caplog.text


def noisy(training: Training, number: int) -> Any:
    with torch.no_grad():
        training.model.weight.add_(0.1)
    return training.manager.batches(training.loader)


def halved(training: Training, number: int) -> Any:
    training.optimizer.param_groups[0]["lr"] *= 0.5
    return training.manager.batches(training.loader)


def set_once(training: Training, number: int) -> Any:
    training.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + number)
    if training.manager.progress.batch == 0:
        with torch.no_grad():
            training.model.weight.add_(0.1)
    return training.manager.batches(training.loader)


@pytest.mark.parametrize(("epoch", "named"), [(noisy, "model 0.weight"), (halved, "optimizer 0.param_groups[0].lr")])
def test_change_that_is_made_again_is_named(
    epoch: Epoch, named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BrokenOff):
        run(tmp_path, epoch, 8)
    assert "not exact" not in caplog.text
    run(tmp_path, epoch)
    AGAIN.require_told(caplog.text)
    assert named in caplog.text


def test_change_that_is_made_once_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = run(tmp_path / "whole", set_once)
    with pytest.raises(BrokenOff):
        run(tmp_path / "broken", set_once, 8)
    assert run(tmp_path / "broken", set_once) == whole
    assert "exact" not in caplog.text


def test_another_loader_at_a_resume_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def by_hand(training: Training) -> None:
        start, taken = training.manager.progress.epoch, training.manager.progress.batch
        for number in range(start, 3):
            resumed = number == start and taken
            loader = skip_first_batches(training.loader, taken) if resumed else training.loader
            for batch in training.manager.batches(loader):
                training.step(batch)
                if len(training.seen) == 3 and not resumed:
                    training.manager.close()
                    return

    by_hand(Training(tmp_path))
    assert "exact" not in caplog.text
    by_hand(Training(tmp_path))
    OTHER.require_told(caplog.text)


def test_data_that_lasting_workers_lack_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()

    def changed(training: Training, number: int) -> Any:
        rows.first = 10 * number
        return training.manager.batches(training.loader)

    loader = DataLoader(rows, 2, num_workers=1, persistent_workers=True)
    with pytest.raises(BrokenOff):
        run(tmp_path, changed, 7, loader)
    WORKERS.require_told(caplog.text)
