"""Objects that take part in making batches and keep a state: it belongs to the batch that was trained on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback, TrainingStateManager
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.testing import Probe, assert_loop_resumes_exactly, assert_resumes_exactly
from tests.field.limits import Limit
from tests.trainer.runs import Net, new_trainer

PERSISTENT_STREAM = Limit(
    what="A stream whose dataset or collator keeps a state, in workers that persist from epoch to epoch",
    when="before training",
    line="not exact: … keeps state in persistent workers of a stream, … set persistent_workers=False",
)
OTHER_WORKERS = Limit(
    what="A dataset or collator with a state, resumed with another number of workers",
    when="at the resume",
    line="each worker has its own state; there were … workers at the save, and there are … now: use the saved number",
    outcome="an error",
)
NO_STATE = Limit(
    what="A dataset, collator or sampler whose `state_dict()` raises, or gives what no file of ours can hold",
    when="before training",
    line="…: its state is not saved: …",
)


class Counts:
    """Counts, and can be made to count on from elsewhere."""

    def __init__(self) -> None:
        self.count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


class Transform(Counts):
    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return x + self.count / 8


class Harder(Counts, Dataset):
    """Rows that depend on how many were made before, with or without a transform that counts in its place."""

    def __init__(self, transform: Transform | None = None) -> None:
        super().__init__()
        self.transform = transform

    def __len__(self) -> int:
        return 18

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        x = torch.randn(4, generator=torch.Generator().manual_seed(index))
        if self.transform is not None:
            x = self.transform(x)
        else:
            self.count += 1
            x = x + self.count / 8
        return {"x": x, "labels": x.sum()}


class Collator(Counts):
    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        self.count += 1
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        return {**batch, "labels": batch["labels"] + self.count}


class Passes(Counts, Sampler[int]):
    """Turns the order by one in each pass, and by as much as a program says for each index."""

    def __init__(self) -> None:
        Counts.__init__(self)
        self.shift = 0

    def __len__(self) -> int:
        return 18

    def __iter__(self) -> Iterator[int]:
        for place in range(18):
            yield (place + self.count + self.shift) % 18
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "shift": self.shift}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.shift = state["count"], state["shift"]


class WhereItWas(Counts, Sampler[int]):
    """Begins where its last iterator was, or where a state says, as torchdata's samplers do."""

    def __init__(self) -> None:
        Counts.__init__(self)
        self.begin: int | None = None

    def __len__(self) -> int:
        return 18

    def __iter__(self) -> Iterator[int]:
        if self.begin is not None:
            self.count, self.begin = self.begin, None
        for place in range(self.count, 18):
            self.count += 1
            yield (7 * place) % 18
        self.count = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begin = state["count"]


class Stream(Counts, IterableDataset):
    """Rows of its pass: another one each time."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        for index in range(first, 18, step):
            x = torch.randn(4, generator=torch.Generator().manual_seed(index)) + self.count
            yield {"x": x, "labels": x.sum()}
        self.count += 1


class WithSampler(Trainer):
    sampler: Any = None

    def _get_train_sampler(self, *args: Any) -> Any:
        return self.sampler


class EachStep(TrainerCallback):
    """Moves an object between two steps, as a curriculum does."""

    def __init__(self, move: Callable[[], None]) -> None:
        self.move = move

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.move()


def trainer(
    folder: str | Path, *, train: Any, named: Any = None, sampler: Any = None, move: Any = None, **settings: Any
) -> Trainer:
    torch.manual_seed(3)
    model = Net()
    more = {"with_trainer": {"data_collator": settings.pop("collator")}} if "collator" in settings else {}
    objects = {} if named is None else {"data": named}
    callbacks = ([] if move is None else [EachStep(move)]) + [LifecycleCallback(objects=objects)]
    settings = {"max_steps": 16, "save_steps": 3, "per_device_train_batch_size": 2, **settings}
    made = new_trainer(
        Path(folder), *callbacks, model=model, train=train, kind=WithSampler if sampler else Trainer, **more, **settings
    )
    if sampler is not None:
        made.sampler = sampler
    return made


def counting(folder: str, **settings: Any) -> Trainer:
    return trainer(folder, train=Harder(), **settings)


def counting_by_name(folder: str, **settings: Any) -> Trainer:
    rows = Harder()
    return trainer(folder, train=rows, named=rows, **settings)


def transform_within(folder: str, **settings: Any) -> Trainer:
    transform = Transform()
    return trainer(folder, train=ConcatDataset([Harder(transform)]), named=transform, **settings)


def collator(folder: str, **settings: Any) -> Trainer:
    one = Collator()
    return trainer(folder, train=Harder(), collator=one, named=one, **settings)


def sampler_of_passes(folder: str, **settings: Any) -> Trainer:
    return trainer(folder, train=Harder(), sampler=Passes(), **settings)


def sampler_that_continues(folder: str, **settings: Any) -> Trainer:
    sampler = WhereItWas()
    return trainer(folder, train=Harder(), sampler=sampler, named=sampler, **settings)


def moved_dataset(folder: str, **settings: Any) -> Trainer:
    rows = Harder()

    def move() -> None:
        rows.count *= 2
        rows.count %= 1001

    return trainer(folder, train=rows, move=move, **settings)


def moved_sampler(folder: str, **settings: Any) -> Trainer:
    sampler = Passes()

    def move() -> None:
        sampler.shift += 5

    return trainer(folder, train=Harder(), sampler=sampler, move=move, **settings)


def stream(folder: str, **settings: Any) -> Trainer:
    return trainer(folder, train=Stream(), **settings)


def stream_with_collator(folder: str, **settings: Any) -> Trainer:
    return trainer(folder, train=Stream(), collator=Collator(), **settings)


KINDS = [counting, counting_by_name, transform_within, collator, sampler_of_passes, sampler_that_continues]
KINDS += [moved_dataset, moved_sampler, stream, stream_with_collator]


@pytest.mark.parametrize("kind", KINDS)
def test_state_is_that_of_the_batch_that_was_trained_on(kind: Callable[..., Trainer], tmp_path: Path) -> None:
    assert_resumes_exactly(kind, break_at=[10, (5, 14)], directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [counting_by_name, collator, sampler_of_passes, sampler_that_continues, stream])
def test_each_worker_has_the_state_of_its_own_last_batch(kind: Callable[..., Trainer], tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        return kind(folder, dataloader_num_workers=2)

    assert_resumes_exactly(make, break_at=[(5, 10, 14)], directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [counting, collator])
def test_workers_that_persist_are_given_the_states_of_those_before_them(kind: Any, tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        return kind(folder, dataloader_num_workers=2, dataloader_persistent_workers=True)

    assert_resumes_exactly(make, break_at=[(4, 10, 14)], directory=tmp_path)


@pytest.mark.parametrize("kind", [counting, collator])
def test_accumulation_counts_the_batches_that_were_trained_on(kind: Callable[..., Trainer], tmp_path: Path) -> None:
    def make(folder: str) -> Trainer:
        return kind(folder, gradient_accumulation_steps=4, max_steps=7, save_steps=2)

    assert_resumes_exactly(make, break_at=[3, 5], directory=tmp_path)


class Arguments(Stream):
    """Its ``state_dict`` wants arguments, as that of a well-known streaming library."""

    def state_dict(self, samples: int, from_beginning: bool) -> dict[str, Any]:  # type: ignore[override]
        return {"samples": samples}


class NotReady(Stream):
    """There is no iterator in this process that it could tell of."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (Harder()[index] for index in range(18))

    def state_dict(self) -> dict[str, Any]:
        raise RuntimeError("no iterator in this process")


class Unstorable(Harder):
    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "lock": object()}


class FailsLater(Arguments):
    """Its ``state_dict`` raises once it was iterated."""

    started = False

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.started = True
        for index in range(18):
            x = torch.randn(4, generator=torch.Generator().manual_seed(index))
            yield {"x": x, "labels": x.sum()}

    def state_dict(self) -> dict[str, Any]:  # type: ignore[override]
        if self.started:
            raise RuntimeError("already being iterated")
        return {"place": 0}


@pytest.mark.parametrize("kind", [Arguments, NotReady, FailsLater])
def test_stream_whose_state_cannot_be_read_is_read_again(
    kind: type[Stream], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        assert_resumes_exactly(lambda folder: trainer(folder, train=kind()), break_at=[5], directory=tmp_path)
    NO_STATE.require_told(caplog.text)


def test_state_that_cannot_be_stored_is_told_before_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, train=Unstorable(), max_steps=2).train()
    NO_STATE.require_told(caplog.text)


def test_states_in_persistent_workers_of_a_stream_are_told_before_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    trainer(tmp_path, train=Stream(), max_steps=2, **workers).train()
    PERSISTENT_STREAM.require_told(caplog.text)


def test_states_for_another_number_of_workers_are_refused(tmp_path: Path) -> None:
    counting(str(tmp_path), max_steps=4).train()
    with pytest.raises(ResumeMismatch) as refusal:
        counting(str(tmp_path), dataloader_num_workers=2).train(resume_from_checkpoint=True)
    OTHER_WORKERS.require_told(str(refusal.value))


Run = Callable[[str, Probe], dict[str, Any]]


def loop(make: Callable[[], Any], *, prepared: bool = True, named: Any = None, stateful: bool = False) -> Run:
    """A loop that saves every 3 steps, over a loader that ``make`` makes; ``named`` takes what is named from it."""

    def run(folder: str, probe: Probe) -> dict[str, Any]:
        config = DataLoaderConfiguration(use_stateful_dataloader=stateful)
        accelerator = Accelerator(cpu=True, dataloader_config=config)
        set_seed(1)
        net, loader = Net(), make()
        objects = {} if named is None else {"data": named(loader)}
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        model, optimizer = accelerator.prepare(net, optimizer)
        if prepared:
            loader = accelerator.prepare(loader)
        manager = TrainingStateManager(accelerator, folder, objects=objects, signals=())
        manager.resume()
        try:
            for _ in manager.epochs(3):
                for batch in manager.batches(loader):
                    loss = model(**batch)["loss"]
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    step = manager.progress.step
                    if step % 3 == 0:
                        manager.save()
                    probe.step(step, batch=batch, loss=loss, model=net)
        finally:
            manager.close()
        return {"weights": net, "optimizer": optimizer}

    return run


def rows_in(loader: Any) -> Any:
    return loader.dataset


LOOPS: dict[str, Run] = {
    "dataset": loop(lambda: DataLoader(Harder(), batch_size=2)),
    "dataset by name, as it is": loop(lambda: DataLoader(Harder(), batch_size=2), prepared=False, named=rows_in),
    "collator": loop(lambda: DataLoader(Harder(), batch_size=2, collate_fn=Collator()), prepared=False),
    "sampler of passes": loop(lambda: DataLoader(Harder(), batch_size=2, sampler=Passes())),
    "sampler that continues": loop(lambda: DataLoader(Harder(), batch_size=2, sampler=WhereItWas())),
    "stream": loop(lambda: DataLoader(Stream(), batch_size=2)),
    "stream by name, as it is": loop(lambda: DataLoader(Stream(), batch_size=2), prepared=False, named=rows_in),
    "stateful loader of a stream": loop(lambda: StatefulDataLoader(Stream(), batch_size=2), prepared=False),
    "stateful loader of accelerate": loop(lambda: DataLoader(Harder(), batch_size=2), stateful=True),
}
WORKERS: dict[str, Run] = {
    "dataset": loop(lambda: DataLoader(Harder(), batch_size=2, num_workers=2)),
    "collator": loop(lambda: DataLoader(Harder(), batch_size=2, collate_fn=Collator(), num_workers=3)),
    "persistent": loop(lambda: DataLoader(Harder(), batch_size=2, num_workers=2, persistent_workers=True)),
    "stream": loop(lambda: DataLoader(Stream(), batch_size=2, num_workers=2)),
    "sampler that continues, in a stateful loader": loop(
        lambda: DataLoader(Harder(), batch_size=2, sampler=WhereItWas(), num_workers=2), stateful=True
    ),
}


@pytest.mark.parametrize("run", LOOPS.values(), ids=LOOPS)
def test_state_in_a_loop_is_that_of_the_batch_that_was_trained_on(run: Run, tmp_path: Path) -> None:
    assert_loop_resumes_exactly(run, break_at=[9, (4, 20)], directory=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("run", WORKERS.values(), ids=WORKERS)
def test_state_in_a_loop_is_that_of_each_worker(run: Run, tmp_path: Path) -> None:
    assert_loop_resumes_exactly(run, break_at=[(4, 9, 20)], directory=tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_that_continues_loses_nothing_of_a_stateful_loader(workers: int, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
    loader = accelerator.prepare(DataLoader(Harder(), batch_size=2, sampler=WhereItWas(), num_workers=workers))
    manager = TrainingStateManager(accelerator, tmp_path, signals=())
    assert [len(list(manager.batches(loader))) for _ in manager.epochs(3)] == [9, 9, 9]
    manager.close()


@pytest.mark.parametrize("stop_at", [2, 6, 8])
def test_evaluation_by_a_stateful_loader_moves_training_alike(stop_at: int, tmp_path: Path) -> None:
    """A loader that was prepared too, and is iterated as it is, without evaluating()."""

    def run(folder: str, probe: Probe) -> dict[str, Any]:
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_stateful_dataloader=True))
        set_seed(1)
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        manager = TrainingStateManager(accelerator, folder, signals=())
        train, evaluated = (DataLoader(Harder(), batch_size=6, shuffle=one) for one in (True, False))
        model, optimizer, train, evaluated = accelerator.prepare(net, optimizer, train, evaluated)
        manager.resume()
        try:
            for _ in manager.epochs(4):
                for batch in manager.batches(train):
                    accelerator.backward(model(**batch)["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
                    if manager.progress.step in (2, 6, 8):
                        manager.save()
                    probe.step(manager.progress.step, batch=batch, model=net)
                assert len(list(evaluated)) == 3
        finally:
            manager.close()
        return {"weights": net}

    assert_loop_resumes_exactly(run, break_at=[stop_at], directory=tmp_path)
