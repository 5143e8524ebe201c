"""A script that was edited between the start and the resume: other rows, another model, other code are named.

Nothing is named where the program is the same, whatever its data does on the fly.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import RandomSampler, SequentialSampler, Subset, TensorDataset
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.data.made_of import rows_of
from tests.field.limits import Limit
from tests.trainer.runs import Net, Rows, break_off, new_trainer

OTHER_ROWS = Limit(
    what="The training data has as many rows as when the run began, and other ones",
    when="at the resume",
    line="not exact: the training data has other rows than when the run started (…)",
)
OTHER_MODEL = Limit(
    what="The model has another module, or another number in one, such as a dropout, than when the run began",
    when="at the resume",
    line="not exact: the model differs from the one that the run started with: … -> …",
)
OTHER_CLASS = Limit(
    what="The optimizer or the schedule that is given to Trainer is of another class than when the run began",
    when="at the resume",
    line="not exact: … was of the class …, and is of … now: make an … to continue the run that was saved",
)
OTHER_CODE = Limit(
    what="A method of the trainer, a callback, the model, the optimizer or the schedule, of what makes batches or "
    "what that holds (such as a transform), or of an object of a loop, was edited since the run began; or such a "
    "function",
    when="at the resume",
    line=(
        "not exact: code was edited since the run started: …; the run continues with the new code, and is exact "
        "only if that computes the same"
    ),
)


REPLACED = Limit(
    what="The trainer, the loss function, the collator, the sampler, the dataset, or a callback that uses the model or "
    "the optimizer, is another one than when the run began, or a plain value of dataset or collator is",
    when="at the resume",
    line=(
        "not exact: replaced since the run started: … -> …; the run continues with what is there now, and is exact "
        "only if that computes the same"
    ),
)


def _with_dropout(share: float) -> Net:
    model = Net()
    model.layers[1].p = share
    return model


def _weighted_by(weight: str) -> type[Trainer]:
    """A trainer class as a script defines it, whose text has ``weight``."""
    scope: dict[str, Any] = {"Trainer": Trainer, "__name__": "__main__"}
    exec(  # the edit of a script
        "class Weighted(Trainer):\n"
        "    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):\n"
        "        outputs = model(**inputs)\n"
        f"        loss = {weight} * outputs['loss']\n"
        "        return (loss, outputs) if return_outputs else loss\n",
        scope,
    )
    kind: type[Trainer] = scope["Weighted"]
    return kind


def _table(seed: int) -> datasets.Dataset:
    rows = Rows(seed=seed)
    table = datasets.Dataset.from_dict({"x": rows.x.tolist(), "labels": rows.labels.tolist()})
    table.set_transform(lambda batch: {key: torch.tensor(column) for key, column in batch.items()})
    return table


class Noisy(Rows):
    """Rows that are augmented as they are read, and remembered."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed=seed)
        self.read = 0
        self.seen = [0] * len(self)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        return {**row, "x": row["x"] + torch.randn(4)}


def _scheduled(edit: int) -> dict[str, Any]:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    factor = [lambda step: 0.9**step, lambda step: 0.5**step][edit]
    return {"model": net, "with_trainer": {"optimizers": (optimizer, LambdaLR(optimizer, factor))}}


class Doubling(Trainer):
    def compute_loss(self, *given: Any, **named: Any) -> Any:
        return super().compute_loss(*given, **named) * 2


def _sampled_by(kind: Any) -> type[Trainer]:
    class Sampled(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return kind(self.train_dataset)

    return Sampled


class Halving(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            for parameter in kwargs["model"].parameters():
                parameter.mul_(0.5)


class Printing(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        print(state.global_step)


class OtherRows(Rows):
    pass


class FromFile(Rows):
    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path


class Rolling:
    def __init__(self, shift: int) -> None:
        self.shift = shift

    def __call__(self, rows: list[Any]) -> Any:
        return {key: torch.stack([row[key] for row in rows]).roll(self.shift, 0) for key in rows[0]}


def _stacked(rows: list[Any]) -> Any:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


class Summing(Net):
    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        return super().forward(x, x.sum(dim=1))


def _doubled_loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    return outputs["loss"] * 2


def _with(model: Net | None = None, **named: Any) -> dict[str, Any]:
    return {"model": model, "with_trainer": named}


EDITS: dict[str, tuple[Callable[[int], dict[str, Any]], Limit]] = {
    "rows": (lambda edit: {"train": Rows(seed=1 + edit)}, OTHER_ROWS),
    "a table": (lambda edit: {"train": _table(1 + edit)}, OTHER_ROWS),
    "augmented": (lambda edit: {"train": Noisy(1 + edit)}, OTHER_ROWS),
    "a list": (lambda edit: {"train": list(map(Rows(seed=1 + edit).__getitem__, range(16)))}, OTHER_ROWS),
    "a subset": (lambda edit: {"train": Subset(Rows(20), [*range(15), 15 + edit])}, OTHER_ROWS),
    "a dropout": (lambda edit: {"model": _with_dropout(0.2 + 0.1 * edit)}, OTHER_MODEL),
    "a schedule": (_scheduled, OTHER_CODE),
    "a loss": (lambda edit: {"kind": _weighted_by(str(1 + edit))}, OTHER_CODE),
    "a trainer": (lambda edit: {"kind": [Trainer, Doubling][edit]}, REPLACED),
    "a trainer less": (lambda edit: {"kind": [Doubling, Trainer][edit]}, REPLACED),
    "a loss function": (lambda edit: _with(Summing(), compute_loss_func=[None, _doubled_loss][edit]), REPLACED),
    "a collator": (lambda edit: _with(data_collator=[_stacked, Rolling(1)][edit]), REPLACED),
    "a collator's number": (lambda edit: _with(data_collator=Rolling(edit)), REPLACED),
    "a sampler": (lambda edit: {"kind": _sampled_by([RandomSampler, SequentialSampler][edit])}, REPLACED),
    "a dataset": (lambda edit: {"train": [Rows, OtherRows][edit]()}, REPLACED),
    "a file": (lambda edit: {"train": FromFile(f"/data/rows {edit}.txt")}, REPLACED),
}


def test_callbacks_that_change_training_are_named_and_others_are_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    break_off(new_trainer(tmp_path, LifecycleCallback(), Halving()))
    for others, told in ([Halving(), Printing()], False), ([Printing()], True), ([Halving(), Halving()], True):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
            new_trainer(tmp_path, LifecycleCallback(), *others).train(
                resume_from_checkpoint=str(tmp_path / "checkpoint-4")
            )
        assert REPLACED.is_told_in(caplog.text) is told


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("edit", [0, 1])
def test_edit_is_named_and_nothing_is_without_one(
    name: str, edit: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, limit = EDITS[name]
    break_off(new_trainer(tmp_path, LifecycleCallback(), **make(0)))
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(), **make(edit)).train(resume_from_checkpoint=True)
    told = [one.getMessage() for one in caplog.records if one.getMessage().startswith("not exact")]
    assert len(told) == edit
    assert all(limit.is_told_in(one) for one in told)


def test_schedule_of_another_class_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def made(kind: Any, *given: Any) -> Trainer:
        net = Net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        both = {"optimizers": (optimizer, kind(optimizer, *given))}
        return new_trainer(tmp_path, LifecycleCallback(), model=net, with_trainer=both)

    schedules = torch.optim.lr_scheduler
    break_off(made(schedules.StepLR, 2))
    made(schedules.StepLR, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "not exact" not in caplog.text
    made(schedules.ExponentialLR, 0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    OTHER_CLASS.require_told(caplog.text)
    assert "scheduler was of the class StepLR, and is of ExponentialLR now" in caplog.text


def test_dropout_that_training_has_changed_is_no_edit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Turns(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            model.layers[1].p = 0.1 * state.global_step

    trainer = break_off(new_trainer(tmp_path, Turns(), LifecycleCallback()))
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        trainer.train(resume_from_checkpoint=True)  # the model has the present dropout
    assert "the model differs" not in caplog.text


def test_time_that_a_model_notes_when_it_is_made_is_no_edit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> Net:
        made = Net()
        made.layers.made_at = time.time()
        return made

    break_off(new_trainer(tmp_path, LifecycleCallback(), model=model()))
    with caplog.at_level(logging.WARNING, logger="hf_lifecycle"):
        new_trainer(tmp_path, LifecycleCallback(), model=model()).train(resume_from_checkpoint=True)
    assert "the model differs" not in caplog.text


def test_columns_of_tensors_are_rows() -> None:
    def columns(seed: int) -> dict[str, str]:
        rows = Rows(seed=seed)
        return dict(rows_of(TensorDataset(rows.x, torch.arange(16)), "", 0))

    assert columns(1) == columns(1)
    assert {key for key in columns(1) if columns(1)[key] != columns(2)[key]} == {"tensors.0"}
