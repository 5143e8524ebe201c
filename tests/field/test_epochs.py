"""Epochs that have different numbers of steps: ended early, or with another gradient accumulation from some step on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.errors import ResumeMismatch
from tests.field.limits import Limit
from tests.field.renaming import renamed
from tests.trainer.runs import Rows, break_off, digests, new_trainer, require_same_end

ACCUMULATION_AMID = Limit(
    what="A callback changes `gradient_accumulation_steps` in the middle of an epoch, and a checkpoint of that epoch "
    "is resumed from",
    when="at the resume",
    line=(
        "gradient_accumulation_steps was changed to … in the middle of epoch …, and Trainer then miscounts the "
        "steps that are left in the epoch. Change it in on_epoch_begin or at an epoch's last step, or resume from a "
        "checkpoint of another epoch"
    ),
    outcome="an error",
)

Act = Callable[[Any, Any, Any, Any], None]


def _ends_early(trainer: Any, args: Any, state: Any, control: Any) -> None:
    control.should_epoch_stop = state.global_step % 7 in (2, 5)


def _ends_by_epoch(trainer: Any, args: Any, state: Any, control: Any) -> None:
    control.should_epoch_stop = round(state.epoch % 1, 4) == (0.25 if state.epoch < 1 else 0.75)


def _accumulates_more(trainer: Any, args: Any, state: Any, control: Any) -> None:
    if state.global_step >= 4:
        args.gradient_accumulation_steps = 2


def _accumulates_more_and_more(trainer: Any, args: Any, state: Any, control: Any) -> None:
    args.gradient_accumulation_steps = 1 + int(state.epoch or 0)


def _accumulates_less(trainer: Any, args: Any, state: Any, control: Any) -> None:
    if state.global_step >= 4:
        args.gradient_accumulation_steps = 1


def _accumulates_with_accelerate(trainer: Any, args: Any, state: Any, control: Any) -> None:
    if state.global_step >= 4:
        args.gradient_accumulation_steps = trainer.accelerator.gradient_accumulation_steps = 2


ACTS: dict[str, tuple[str, Act, dict[str, Any]]] = {
    "ended early": ("on_step_end", _ends_early, {}),
    "ended early by the epoch": ("on_step_end", _ends_by_epoch, {"max_steps": 16}),
    "ended early, by epochs": ("on_step_end", _ends_early, {"max_steps": -1, "num_train_epochs": 4}),
    "ended early, saved by epochs": ("on_step_end", _ends_early, {"save_strategy": "epoch"}),
    "ended early, accumulated": ("on_step_end", _ends_early, {"gradient_accumulation_steps": 2, "train": Rows(28)}),
    "accumulated more": ("on_epoch_begin", _accumulates_more, {}),
    "accumulated more, at a step's end": ("on_step_end", _accumulates_more, {}),
    "accumulated more, a rest": ("on_epoch_begin", _accumulates_more, {"train": Rows(20), "max_steps": 14}),
    "accumulated more and more": ("on_epoch_begin", _accumulates_more_and_more, {"train": Rows(24)}),
    "accumulated less": ("on_epoch_begin", _accumulates_less, {"gradient_accumulation_steps": 2, "train": Rows(32)}),
    "accumulated with accelerate": ("on_step_end", _accumulates_with_accelerate, {}),
}


class Acting(TrainerCallback):
    """Calls a function at an event."""

    trainer: Any = None

    def __init__(self, event: str, act: Act) -> None:
        setattr(self, event, lambda args, state, control, **_: act(self.trainer, args, state, control))


def _trainer(directory: Path, event: str, act: Act, **settings: Any) -> Trainer:
    acting = Acting(event, act)
    made = new_trainer(directory, acting, LifecycleCallback(), **{"max_steps": 12, "save_steps": 1, **settings})
    acting.trainer = made
    return made


def _rows(trainer: Trainer) -> list[dict[str, float]]:
    kept = [{name: one for name, one in row.items() if "_runtime" not in name} for row in trainer.state.log_history]
    return [{name: one for name, one in row.items() if not name.endswith("_per_second")} for row in kept]


@pytest.mark.parametrize("name", ACTS)
def test_run_whose_epochs_differ_goes_on_where_it_was(name: str, tmp_path: Path) -> None:
    event, act, settings = ACTS[name]
    whole = _trainer(tmp_path / "whole", event, act, **settings)
    whole.train()
    for step in (2, 3, 5, 7):
        place = tmp_path / f"broken off at {step}"
        break_off(_trainer(place, event, act, **settings), step=step)
        resumed = _trainer(place, event, act, **settings)
        resumed.train(resume_from_checkpoint=True)
        assert digests(resumed) == digests(whole), place
        assert _rows(resumed) == _rows(whole), place
        assert (resumed.state.global_step, resumed.state.epoch) == (whole.state.global_step, whole.state.epoch), place


def test_accumulation_that_changed_in_the_middle_of_an_epoch_is_refused_in_it(tmp_path: Path) -> None:
    def act(trainer: Any, args: Any, state: Any, control: Any) -> None:
        if state.global_step >= 2:
            args.gradient_accumulation_steps = 2

    break_off(_trainer(tmp_path, "on_step_end", act, train=Rows(32)), step=4)
    with pytest.raises(ResumeMismatch) as raised:
        _trainer(tmp_path, "on_step_end", act, train=Rows(32)).train(resume_from_checkpoint=True)
    ACCUMULATION_AMID.require_told(str(raised.value))


def test_position_that_cannot_be_given_to_trainer_is_refused(tmp_path: Path) -> None:
    event, act, _ = ACTS["ended early"]
    break_off(_trainer(tmp_path, event, act), step=3)
    with renamed("_init_training_state"), pytest.raises(ResumeMismatch, match="epochs of different lengths"):
        _trainer(tmp_path, event, act).train(resume_from_checkpoint=True)


class Told(Sampler[list[int]]):
    """Batches in the order of the epoch that it was told."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return iter([order[first : first + 4] for first in range(0, 16, 4)])


class OwnLoader(Trainer):
    """``prepares``: whether accelerate does, which alone tells a batch sampler the epoch."""

    prepares = False

    def get_train_dataloader(self) -> Any:
        loader = DataLoader(self.train_dataset, batch_sampler=Told())
        return self.accelerator.prepare(loader) if self.prepares else loader


class OwnPreparedLoader(OwnLoader):
    prepares = True


@pytest.mark.parametrize("kind", [OwnLoader, OwnPreparedLoader])
def test_batch_sampler_is_told_the_epoch_after_a_resume_as_before(kind: type[Trainer], tmp_path: Path) -> None:
    require_same_end(
        lambda folder: new_trainer(tmp_path / folder, LifecycleCallback(), kind=kind, max_steps=10), step=6
    )
