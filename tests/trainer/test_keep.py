"""Which checkpoints a training keeps, told by ``keep``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle import KeepBest, KeepLast, LifecycleCallback
from hf_lifecycle.checkpoint.directory.listing import infos_in

from .runs import new_trainer

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"]}


def kept(place: Path) -> list[int]:
    return [info.step for info in infos_in(place)]


@pytest.mark.parametrize(("mode", "pick"), [("min", min), ("max", max)])
def test_best_are_those_of_the_metric_at_their_own_step(tmp_path: Path, mode: Any, pick: Any) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(keep=KeepBest(1, mode)), max_steps=10, **EVALUATED)
    trainer.train()
    losses = {row["step"]: row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row}
    best = pick(losses, key=lambda step: losses[step])
    assert kept(tmp_path) == sorted({best, 10})
    assert [info.metric for info in infos_in(tmp_path)] == [losses[step] for step in sorted({best, 10})]


def test_checkpoint_without_an_evaluation_of_its_own_has_no_metric(tmp_path: Path) -> None:
    settings = {**EVALUATED, "eval_steps": 2, "save_steps": 3, "metric_for_best_model": "loss"}
    new_trainer(tmp_path, LifecycleCallback(), **settings).train()
    assert [info.metric is None for info in infos_in(tmp_path)] == [True, False]


def test_keep_and_save_total_limit_exclude_each_other(tmp_path: Path) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback(keep=KeepLast(2)), save_total_limit=3)
    with pytest.raises(ValueError, match=r"keep=KeepLast\(count=2\) and save_total_limit=3"):
        trainer.train()
    assert trainer.args.save_total_limit == 3


def test_keep_that_is_no_policy_is_refused_when_it_is_given() -> None:
    with pytest.raises(TypeError, match="keep must be a RetentionPolicy"):
        LifecycleCallback(keep=3)  # type: ignore[arg-type]


def test_new_run_beside_the_checkpoints_of_a_longer_one_keeps_its_own(tmp_path: Path) -> None:
    new_trainer(tmp_path, LifecycleCallback(), max_steps=10, save_steps=10).train()
    new_trainer(tmp_path, LifecycleCallback(), max_steps=4, save_total_limit=1).train()
    assert kept(tmp_path) == [4, 10]


@pytest.mark.parametrize("may_again", [False, True])
def test_checkpoint_resumed_from_goes_with_the_next_save_unless_trainer_may_begin_from_it_again(
    tmp_path: Path, *, may_again: bool
) -> None:
    settings = {"save_total_limit": 1, "auto_find_batch_size": may_again}
    new_trainer(tmp_path, LifecycleCallback(), max_steps=2, save_steps=2, **settings).train()
    again = new_trainer(tmp_path, LifecycleCallback(), max_steps=6, save_steps=2, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert kept(tmp_path) == ([2, 6] if may_again else [6])
