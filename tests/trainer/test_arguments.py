"""Which arguments are compared, how they are graded, and what is read from Trainer's frames."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.hosts.trainer.host import callbacks_like, path_given_to_train, unlogged_loss
from hf_lifecycle.hosts.trainer.resume.arguments import Steering, capture_arguments, compare_arguments
from hf_lifecycle.state.environment import Difference, Grade

from .runs import new_trainer, saved_run


def compared(saved: dict[str, Any], present: dict[str, Any], *, streamed: bool = False) -> list[Difference]:
    steering = Steering(evaluations=False, best=False, streamed=streamed)
    return compare_arguments(saved, present, TrainingArguments, steering)


def settled(output_dir: Path, **settings: Any) -> dict[str, Any]:
    return capture_arguments(TrainingArguments(output_dir=str(output_dir), use_cpu=True, **settings))


def test_equal_arguments_have_no_difference(tmp_path: Path) -> None:
    assert compared(settled(tmp_path), settled(tmp_path / "elsewhere")) == []


def test_what_is_captured_is_plain_and_holds_no_secret(tmp_path: Path) -> None:
    captured = settled(tmp_path, hub_token="hf_secret", lr_scheduler_kwargs={"num_cycles": 2}, fsdp=None)
    assert json.loads(json.dumps(captured)) == captured
    assert "secret" not in json.dumps(captured)


@pytest.mark.parametrize(
    ("setting", "grade"),
    [
        ({"learning_rate": 1.0}, Grade.BREAKS),
        ({"seed": 1}, Grade.BREAKS),
        ({"adam_beta2": 0.5}, Grade.BREAKS),
        ({"warmup_steps": 3}, Grade.BREAKS),
        ({"label_smoothing_factor": 0.1}, Grade.BREAKS),
        ({"eval_delay": 2}, Grade.HARMLESS),
        ({"save_total_limit": 2}, Grade.HARMLESS),
        ({"dataloader_num_workers": 2}, Grade.HARMLESS),
        ({"dataloader_prefetch_factor": 2, "dataloader_num_workers": 2}, Grade.HARMLESS),
        ({"load_best_model_at_end": True, "eval_strategy": "steps"}, Grade.HARMLESS),
    ],
)
def test_a_difference_has_the_grade_of_what_it_does(tmp_path: Path, setting: dict[str, Any], grade: Grade) -> None:
    differences = compared(settled(tmp_path), settled(tmp_path, **setting))
    assert {difference.grade for difference in differences} == {grade}
    assert set(setting) <= {difference.name for difference in differences}


def test_workers_of_a_stream_break_exactness(tmp_path: Path) -> None:
    (difference,) = compared(settled(tmp_path), settled(tmp_path, dataloader_num_workers=2), streamed=True)
    assert difference.grade is Grade.BREAKS
    assert str(difference) == "dataloader_num_workers: 0 -> 2 (breaks exactness)"


def test_an_argument_that_one_version_lacks_is_told(tmp_path: Path) -> None:
    saved = settled(tmp_path) | {"optim_of_tomorrow": 1}
    (difference,) = compared(saved, settled(tmp_path))
    assert (difference.name, difference.saved, difference.present) == ("optim_of_tomorrow", 1, None)


class Looks(TrainerCallback):
    """Reads Trainer's frames at each event."""

    def __init__(self) -> None:
        self.paths: list[Path | None] = []
        self.losses: list[float] = []
        self.alike = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.paths.append(path_given_to_train())
        self.alike = callbacks_like(self)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        loss = unlogged_loss()
        assert loss is not None
        self.losses.append(float(loss))

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        assert unlogged_loss() is not None


def test_the_path_given_to_train_is_seen(tmp_path: Path) -> None:
    checkpoint = saved_run(tmp_path)
    looks = Looks()
    new_trainer(tmp_path / "fresh", looks).train()
    new_trainer(tmp_path, looks).train(resume_from_checkpoint=True)
    assert looks.paths == [None, checkpoint]
    assert path_given_to_train() is None


def test_the_loss_since_the_last_row_is_seen(tmp_path: Path) -> None:
    looks = Looks()
    trainer = new_trainer(tmp_path, looks)
    trainer.train()
    (first,) = [row["loss"] for row in trainer.state.log_history if row.get("step") == 2 and "loss" in row]
    assert looks.losses[1] / 2 == first
    assert looks.losses[2] < looks.losses[1] + looks.losses[0]
    assert unlogged_loss() is None


def test_frames_are_found_below_a_trainer_that_overrides_train(tmp_path: Path) -> None:
    class Outer(Trainer):
        def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
            return super().train(resume_from_checkpoint, **kwargs)

    checkpoint = saved_run(tmp_path)
    looks = Looks()
    new_trainer(tmp_path, looks, kind=Outer).train(resume_from_checkpoint=True)
    assert looks.paths == [checkpoint]
    assert looks.alike == 1
    assert callbacks_like(looks) == 1


def test_two_of_us_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than one LifecycleCallback"):
        new_trainer(tmp_path, LifecycleCallback(), LifecycleCallback()).train()


def test_functions_and_sets_are_compared_by_what_they_are(tmp_path: Path) -> None:
    def arguments(labels: list[str]) -> TrainingArguments:
        def context() -> None: ...

        given = {"use_reentrant": False, "context_fn": context}
        return TrainingArguments(str(tmp_path), gradient_checkpointing_kwargs=given, label_names=set(labels))  # type: ignore[arg-type]

    one, other = (capture_arguments(arguments(labels)) for labels in (["a", "b", "c"], ["c", "b", "a"]))
    assert compared(one, other) == []
    assert "0x" not in repr(one)
