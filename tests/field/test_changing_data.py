"""What makes batches and is changed while training runs: labels, a cache, the weights of an order, a longer input."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from tests.trainer.runs import Labelled, Net, Rows, break_off, digests, new_trainer, require_same_end

_TOLD = "changes during training, and batches are prepared in advance"
Make = Callable[[Path], Trainer]


class Changes(TrainerCallback):
    """Calls a function at an event; the trainer is given later."""

    def __init__(self, event: str, change: Callable[[Any], object]) -> None:
        self.trainer: Any = None
        self._change = change
        setattr(self, event, self._meet)

    def _meet(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._change(self.trainer)


class Cached(Rows):
    """Draws noise once for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, torch.Tensor]] = {}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index not in self.rows:
            row = super().__getitem__(index)
            self.rows[index] = row | {"x": row["x"] + torch.randn(4)}
        return self.rows[index]


class Scaling:
    """A collator with a factor."""

    factor = 1.0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(rows)
        return batch | {"x": batch["x"] * self.factor}


class Mining(Trainer):
    """Draws rows by weights."""

    def get_train_dataloader(self) -> Any:
        self.order = WeightedRandomSampler(torch.ones(16), 16, generator=torch.Generator().manual_seed(3))
        return self.accelerator.prepare(DataLoader(self.train_dataset, 4, sampler=self.order))


def _relabel(trainer: Any) -> None:
    with torch.no_grad():
        found = trainer.model.layers(trainer.train_dataset.x).squeeze(-1)
    trainer.train_dataset.values = (found + torch.rand(16)).tolist()


def _widen(trainer: Any) -> None:
    if trainer.state.global_step % 3 == 0:
        trainer.data_collator.factor *= 2


def _made(event: str, change: Callable[[Any], object], train: Callable[[], Rows], **more: Any) -> Make:
    def make(folder: Path) -> Trainer:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = Net()
        changes = Changes(event, change)
        given = {"data_collator": Scaling()} if change is _widen else {}
        trainer = new_trainer(
            folder, changes, LifecycleCallback(), model=model, train=train(), with_trainer=given, max_steps=10, **more
        )
        changes.trainer = trainer
        return trainer

    return make


def _nothing(trainer: Any) -> None:
    """For what changes by itself."""


def _shuffle(trainer: Any) -> None:
    random.shuffle(trainer.train_dataset.order)


def _weigh(trainer: Any) -> None:
    trainer.order.weights.mul_(torch.rand(16, dtype=torch.float64))


def _clip(trainer: Any) -> None:
    trainer.args.max_grad_norm *= 0.5


EXACT: dict[str, Make] = {
    "labels, each epoch": _made("on_epoch_begin", _relabel, Labelled),
    "labels, each epoch, with workers": _made("on_epoch_begin", _relabel, Labelled, dataloader_num_workers=2),
    "an order in the dataset": _made("on_epoch_begin", _shuffle, Labelled),
    "labels, each epoch, saved by epoch": _made("on_epoch_begin", _relabel, Labelled, save_strategy="epoch"),
    "an order in the dataset, saved by epoch": _made("on_epoch_begin", _shuffle, Labelled, save_strategy="epoch"),
    "a cache": _made("on_epoch_begin", _nothing, Cached),
    "weights of a sampler": _made("on_epoch_begin", _weigh, Rows, kind=Mining),
    "an argument": _made("on_step_end", _clip, Rows, max_grad_norm=0.5),
}
TOLD: dict[str, tuple[Make, str]] = {
    "weights of a sampler, amid an epoch": (_made("on_step_end", _weigh, Rows, kind=Mining), "sampler.sampler.weights"),
    "a collator, at a step": (_made("on_step_end", _widen, Rows), "data_collator.factor"),
    "labels, with workers that live on": (
        _made("on_epoch_begin", _relabel, Labelled, dataloader_num_workers=1, dataloader_persistent_workers=True),
        "train_dataset.values",
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_is_as_the_next_batch_found_it_goes_on(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make = EXACT[name]
    whole = make(tmp_path / "whole")
    whole.train()
    in_first, in_second, at_its_end = 3, 5, 8  # of the epochs
    for step in (in_second, at_its_end) if "saved by epoch" in name else (in_first, in_second, at_its_end):
        place = tmp_path / f"broken off at {step}"
        break_off(make(place), step=step)
        resumed = make(place)
        resumed.train(resume_from_checkpoint=True)
        assert digests(resumed) == digests(whole), place
    assert "not exact" not in caplog.text


@pytest.mark.parametrize("name", TOLD)
def test_what_may_have_changed_since_is_named_once(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make, path = TOLD[name]
    make(tmp_path).train()
    assert caplog.text.count(f"maybe not exact: {path} {_TOLD}") == 1
    assert caplog.text.count("not exact") == 1


def test_long_list_that_is_changed_in_place_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Long(Rows):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = list(range(20_000))

    make = _made("on_epoch_begin", lambda trainer: random.shuffle(trainer.train_dataset.numbers), Long)
    make(tmp_path).train()
    assert (
        "train_dataset.numbers changes during training and is not saved, so a resumed run starts with its initial value"
    ) in caplog.text


class OfLibrary:
    """A collator with a setting, as those of a library have."""

    __module__ = "transformers.data"

    def __init__(self) -> None:
        self.share = 0.5

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        return {key: torch.stack([row[key] for row in rows]) * self.share for key in ("x", "labels")}


def _scaled(event: str) -> Make:
    def make(folder: Path) -> Trainer:
        collator = OfLibrary()
        callback = Changes(event, lambda _: setattr(collator, "share", collator.share * 0.8))
        return new_trainer(folder, callback, LifecycleCallback(), with_trainer={"data_collator": collator}, max_steps=8)

    return make


def test_setting_of_a_librarys_collator_that_a_callback_changes_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    require_same_end(lambda name: _scaled("on_epoch_end")(tmp_path / name), step=6)
    assert "not exact" not in caplog.text


def test_setting_of_a_librarys_collator_that_changes_from_step_to_step_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _scaled("on_step_end")(tmp_path).train()
    assert f"data_collator.share {_TOLD}" in caplog.text


def test_count_in_the_transform_of_a_dataset_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    datasets = pytest.importorskip("datasets")
    calls, rows = [0], Rows()

    def transform(batch: dict[str, Any]) -> dict[str, Any]:
        calls[0] += 1
        return {**batch, "x": [torch.tensor(one) * calls[0] for one in batch["x"]]}

    train = datasets.Dataset.from_dict({"x": rows.x.tolist(), "labels": rows.labels.tolist()})
    train.set_transform(transform)
    new_trainer(tmp_path, LifecycleCallback(), train=train, remove_unused_columns=False).train()
    assert f"train_dataset.transform.calls {_TOLD}" in caplog.text


class OwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        self.own = DataLoader(self.train_dataset, 4, shuffle=True)
        return self.own


class PreparedLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        self.own = super().get_train_dataloader()
        return self.own


@pytest.mark.parametrize("kind", [OwnLoader, PreparedLoader])
def test_collate_fn_that_a_callback_gives_a_loader_has_the_effect_that_it_has_without_us(
    kind: Any, tmp_path: Path
) -> None:
    def give(trainer: Any) -> None:
        trainer.own.collate_fn = lambda rows: {
            key: torch.stack([row[key] for row in rows]) * 2.0 for key in ("x", "labels")
        }

    def make(name: str) -> Trainer:
        callback = Changes("on_epoch_begin", give)
        callback.trainer = new_trainer(tmp_path / name, callback, LifecycleCallback(), kind=kind, max_steps=8)
        return callback.trainer  # type: ignore[no-any-return]

    require_same_end(make, step=6)
