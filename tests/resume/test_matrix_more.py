"""Exactness between runs that differ: by a real kill, in random data, in the callback, in evaluations or workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_lifecycle.errors import LifecycleError

from .cases import CASES, schedule
from .cases.schedule import into_another_directory
from .cases.tiny import NOISES, Rows, regression
from .harness import Arm, Attempt, Break, Case, attempt, missing_packages, run_broken, run_unbroken
from .outcome import Outcome, Recorder, compare, digest, flatten, kind_of
from .process import attempt_in_process

BY_NAME = {case.name: case for case in CASES}
SAME_TRAINING = {"batches", "weights", "optimizer", "scheduler", "scaler", "rng"}


def _train(run: Attempt, **settings: Any) -> Trainer:
    return regression(run, train=Rows(noise=NOISES["torch"]), **{"eval_strategy": "steps", "eval_steps": 4, **settings})


PLAIN = Case("plain", "dropout, augmentation, evaluations", _train)


def _end(case: Case, place: Path, **arguments: Any) -> Outcome:
    outcome = attempt(case, Attempt(place, "callback", {"args": arguments}))
    assert outcome is not None
    return outcome


def _differences(a: Outcome, b: Outcome) -> list[str]:
    """Differences in training, whatever was logged."""
    return [problem for problem in compare(a, b) if kind_of(problem) in SAME_TRAINING]


def _every_third(cases: Sequence[Case]) -> list[Any]:
    """The cases as parameters; two of three are left to the exhaustive run."""
    rest = pytest.mark.exhaustive
    return [pytest.param(case, id=case.name, marks=[rest] if n % 3 else []) for n, case in enumerate(cases)]


@pytest.mark.parametrize("case", _every_third(schedule.CASES))
def test_schedules_are_exact_with_random_data_too(case: Case, tmp_path: Path) -> None:
    options: Mapping[str, Any] = {"noise": "numpy"}
    unbroken = run_unbroken(case, tmp_path / "unbroken" / "run", "callback", options)
    assert compare(unbroken, run_broken(case, tmp_path / "broken" / "run", "callback", options)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "killed_at"),
    [
        ("mlm_2", Break(10)),
        pytest.param("stream_noise_2", Break(9, "on_step_end"), marks=pytest.mark.exhaustive),
        pytest.param("stopping_counter", Break(10, "on_prediction_step"), marks=pytest.mark.exhaustive),
    ],
)
def test_killed_process_resumes_exactly(name: str, killed_at: Break, tmp_path: Path) -> None:
    unbroken = attempt_in_process(name, tmp_path / "unbroken" / "run", "callback")
    assert attempt_in_process(name, tmp_path / "broken" / "run", "callback", killed_at=killed_at) is None
    resumed = attempt_in_process(name, tmp_path / "broken" / "run", "callback", resume=True)
    assert unbroken is not None
    assert resumed is not None
    assert resumed.started_at > 0
    assert compare(unbroken, resumed) == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"eval_steps": 1}, id="each_step"),
        pytest.param({"eval_steps": 5}, id="not_dividing"),
        pytest.param({"eval_strategy": "no"}, id="never"),
        pytest.param({"eval_strategy": "epoch", "eval_on_start": True}, id="by_epoch_and_on_start"),
    ],
)
def test_evaluating_more_or_less_often_trains_the_same(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert _differences(_end(PLAIN, tmp_path / "a"), _end(PLAIN, tmp_path / "b", **arguments)) == []


@pytest.mark.parametrize(
    "name",
    [
        "augment_python_0",
        "mlm_0",
        *(
            pytest.param(name, marks=pytest.mark.exhaustive)
            for name in ("augment_numpy_0", "augment_torch_0", "vit_crops_0")
        ),
    ],
)
def test_more_workers_train_the_same(name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    if missing_packages(case):
        pytest.skip(f"needs {missing_packages(case)}")
    none = _end(case, tmp_path / "none")
    for workers in (1, 3):
        assert _differences(none, _end(case, tmp_path / str(workers), dataloader_num_workers=workers)) == []


@pytest.mark.parametrize(
    "arguments", [{"logging_steps": 1}, {"save_steps": 3}, {"disable_tqdm": True, "save_steps": 1}]
)
def test_saving_and_logging_more_often_trains_the_same(arguments: dict[str, Any], tmp_path: Path) -> None:
    assert _differences(_end(PLAIN, tmp_path / "a"), _end(PLAIN, tmp_path / "b", **arguments)) == []


def _saved_weights(place: Path) -> Any:
    from safetensors.torch import load_file

    return load_file(place / "checkpoint-8" / "model.safetensors")


class _Weights:
    """A trainer's weights at the moment of the first forward pass."""

    def __init__(self, trainer: Trainer) -> None:
        self.digest = ""
        self.trainer = trainer
        trainer.model.register_forward_pre_hook(self)

    def __call__(self, module: Any, inputs: Any) -> None:
        self.digest = self.digest or digest(sorted(flatten(module.state_dict())))


@pytest.mark.core
@pytest.mark.parametrize(("first", "then"), [("stock", "callback"), ("callback", "stock")])
def test_callback_can_be_added_to_a_run_and_taken_away(first: Arm, then: Arm, tmp_path: Path) -> None:
    place = tmp_path / "run"
    attempt(PLAIN, Attempt(place, first), broken_at=Break(10))
    trainer = PLAIN.build(Attempt(place, then))
    weights, recorder = _Weights(trainer), Recorder(trainer)
    recorder.attach()
    trainer.train(resume_from_checkpoint=True)
    outcome = recorder.outcome()
    assert outcome.started_at == 8
    assert outcome.parts["progress"]["global_step"] == 12
    assert weights.digest == digest(sorted(flatten(_saved_weights(place))))


def test_added_callback_is_exact_from_its_first_save_on(tmp_path: Path) -> None:
    ends = []
    for breaks in ((Break(6),), (Break(6), Break(10))):
        place = tmp_path / str(len(breaks)) / "run"
        attempt(PLAIN, Attempt(place, "stock"), broken_at=breaks[0])
        for broken_at in breaks[1:]:
            attempt(PLAIN, Attempt(place, "callback"), resume_from=True, broken_at=broken_at)
        ends.append(attempt(PLAIN, Attempt(place, "callback"), resume_from=True))
    first, second = ends
    assert first is not None
    assert second is not None
    assert second.started_at == 8
    assert _differences(first, second) == []


def test_resuming_by_path_twice_gives_the_same_run_twice(tmp_path: Path) -> None:
    attempt(PLAIN, Attempt(tmp_path / "run", "callback"), broken_at=Break(10))
    _, checkpoint = into_another_directory(tmp_path / "run")
    ends = [attempt(PLAIN, Attempt(tmp_path / name, "callback"), resume_from=checkpoint) for name in ("once", "again")]
    assert ends[0] is not None
    assert ends[1] is not None
    assert compare(ends[0], ends[1]) == []


def test_changed_evaluations_and_workers_resume_to_the_same_weights(tmp_path: Path) -> None:
    case = Case(
        "changed",
        "evaluations and workers changed on resume",
        PLAIN.build,
        resumed_options={"args": {"eval_steps": 1, "dataloader_num_workers": 2}},
    )
    unbroken = run_unbroken(case, tmp_path / "unbroken" / "run", "callback")
    assert _differences(unbroken, run_broken(case, tmp_path / "broken" / "run", "callback")) == []


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"ignore_data_skip": True}, id="ignore_data_skip"),
        pytest.param({"per_device_train_batch_size": 8}, id="batch_size"),
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"max_grad_norm": 0.5}, id="max_grad_norm"),
    ],
)
def test_changed_argument_that_breaks_exactness_is_refused(arguments: dict[str, Any], tmp_path: Path) -> None:
    attempt(PLAIN, Attempt(tmp_path / "run", "callback"), broken_at=Break(10))
    with pytest.raises(LifecycleError):
        attempt(PLAIN, Attempt(tmp_path / "run", "callback", {"args": arguments}), resume_from=True)
