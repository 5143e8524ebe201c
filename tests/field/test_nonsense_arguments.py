"""An argument that cannot be meant is an error where it is given, which names the argument and what it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_lifecycle import (
    EarlyStopping,
    KeepBest,
    LifecycleCallback,
    Mirror,
    ResumeMismatch,
    Run,
    TrainingStateManager,
    latest_checkpoint,
)
from hf_lifecycle.cli import app as command_line
from tests.trainer.runs import Net, Rows, new_trainer, saved_run

MANY = np.array([1.0, 2.0])
PLAIN = b"without a state"
OF_BOTH: list[tuple[str, Any]] = [
    *(("signals", value) for value in (None, 15, True, "SIGTERM", [None], ["SIGNOPE"], PLAIN)),
    *(("on_preempt", value) for value in (None, "stop", MANY)),
    *(("time_limit", value) for value in (True, 0, -1.5, float("nan"), float("inf"), "4h", "", [], MANY, PLAIN)),
    *(("on_world_size_change", value) for value in (None, "go on", MANY)),
    *(("mirror", value) for value in (7, b"there", "", "s3://", "://there", "a\0b", "nope://there", "a://b::c://d")),
    *(("keep", value) for value in (3, "last", MANY)),
    *(("elastic", value) for value in (None, 1, "yes", MANY)),
    *(("strict", value) for value in (None, 1, "no", MANY)),
    *(("objects", value) for value in (3, [PLAIN], {"a": PLAIN}, {3: Net()}, MANY)),
]
OF_CALLBACK: list[tuple[str, Any]] = [
    *(("patience", value) for value in (True, -1, 1.5, "3", MANY)),
    *(("mode", value) for value in ("", 0, [], "minimal", MANY)),
    *(("monitor", value) for value in ("", 3, MANY)),
    *(("min_delta", value) for value in (None, -1, float("nan"), "0", MANY)),
    *(("early_stopping", value) for value in (True, 3, EarlyStopping, MANY)),
    *(("resume_from", value) for value in (True, 3, "", b"there", "a\0b", MANY)),
    *(("on_save_failure", value) for value in (None, "ignore", MANY)),
    *(("async_save", value) for value in (None, 1, "no", MANY)),
]
OF_MANAGER: list[tuple[str, Any]] = [
    *(("directory", value) for value in (True, 3, "", b"there", "a\0b", MANY)),
    *(("keep_last", value) for value in (True, 0, -1, 1.5, "3", MANY)),
    *(("seed", value) for value in (True, 1.5, "3", MANY)),
]
WRONG = (TypeError, ValueError, ImportError)


def short(value: object) -> str:
    return repr(value)[:24]


def require_named(name: str, call: Callable[[], object]) -> str:
    """``call()`` raises an error that begins with the argument's name, in one line without values of an array."""
    with pytest.raises(WRONG) as caught:
        call()
    said = str(caught.value)
    assert said.startswith((name, f"objects[{name!r}]")) or (name == "objects" and said.startswith("objects")), said
    assert "\n" not in said
    assert "array([" not in said
    return said


@pytest.mark.parametrize(("name", "value"), [*OF_BOTH, *OF_CALLBACK], ids=short)
def test_argument_of_the_callback_that_cannot_be_meant_is_named(name: str, value: Any) -> None:
    beside = {"patience": 3} if name in ("mode", "monitor", "min_delta") else {}
    require_named(name, lambda: LifecycleCallback(**{**beside, name: value}))


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.mark.parametrize(("name", "value"), [*OF_BOTH, *OF_MANAGER], ids=short)
def test_argument_of_the_manager_that_cannot_be_meant_is_named(
    name: str, value: Any, accelerator: Accelerator, tmp_path: Path
) -> None:
    require_named(name, lambda: TrainingStateManager(accelerator, **{"directory": tmp_path, name: value}))
    if name in ("signals", "on_preempt", "on_world_size_change", "strict", "objects", "seed"):
        require_named(name, lambda: TrainingStateManager(**{name: value}))


@pytest.fixture
def manager(accelerator: Accelerator, tmp_path: Path) -> Iterator[TrainingStateManager]:
    one = TrainingStateManager(accelerator, tmp_path / "run")
    yield one
    one.close()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(
            ("count", lambda manager, value=value: manager.epochs(value))
            for value in (None, "3", -1, 1.5, True, float("nan"))
        ),
        *(
            ("max_steps", lambda m, value=value: m.epochs(1, max_steps=value))
            for value in (-1, "3", 2.5, True, float("nan"))
        ),
        *(("loader", lambda m, value=value: next(m.batches(value))) for value in (None, 3, DataLoader, Net())),
        *(("name", lambda m, value=value: next(m.batches([1], name=value))) for value in (3, "", ["a"])),
        *(("checkpoint", lambda m, value=value: m.resume(value)) for value in (3, "", b"there", "a\0b", "absent")),
        *(("metric", lambda m, value=value: m.save(metric=value)) for value in ("best", True, [1.0], MANY)),
        *(("epoch_is_over", lambda m, value=value: m.save(epoch_is_over=value)) for value in ("no", 1.5, MANY)),
        *(("wait", lambda m, value=value: m.save(wait=value)) for value in ("no", None, MANY)),
        *(("path", lambda m, value=value: m.save_state(value, 1, 2)) for value in (None, 3, b"there.pt", "a\0b.pt")),
        *(("path", lambda m, value=value: m.load_state(value)) for value in (None, 3, b"there.pt", "a\0b.pt")),
        ("restore_rng", lambda m: m.load_state("there.pt", restore_rng=MANY)),
        ("mode", lambda m: m.is_best(1.0, mode=MANY)),
    ],
)
def test_argument_of_a_method_of_the_manager_that_cannot_be_meant_is_named(
    name: str, call: Callable[[TrainingStateManager], object], manager: TrainingStateManager
) -> None:
    require_named(name, lambda: call(manager))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        *(
            ("directory", lambda value=value: latest_checkpoint(value))
            for value in (None, 3, "", b"there", "a\0b", MANY)
        ),
        ("mirror", lambda: latest_checkpoint(".", mirror=3)),
        ("mirror", lambda: latest_checkpoint(".", mirror="nope://there")),
        ("output_dir", lambda: Run(None)),
        ("output_dir", lambda: Run("")),
        ("mirror", lambda: Mirror(None)),
        ("verify", lambda: Mirror("there", verify=MANY)),
        ("mode", lambda: KeepBest(1, MANY)),
        ("mode", lambda: EarlyStopping(mode=MANY)),
        ("min_delta_mode", lambda: EarlyStopping(min_delta_mode=MANY)),
        ("patience_unit", lambda: EarlyStopping(patience_unit=MANY)),
        ("check_finite", lambda: EarlyStopping(check_finite=MANY)),
        ("progress", lambda: EarlyStopping.replay([{"eval_loss": 1.0}], progress=["step"])),
        ("metric", lambda: EarlyStopping.replay([{"eval_loss": 1.0}], metric=None)),
    ],
)
def test_argument_of_another_function_that_cannot_be_meant_is_named(name: str, call: Callable[[], object]) -> None:
    require_named(name, call)


def test_unknown_protocol_of_a_mirror_is_named_with_what_to_install() -> None:
    said = require_named("mirror", lambda: LifecycleCallback(mirror="nope://bucket"))
    assert "no installed package knows nope://" in said
    assert "s3:// with the package s3fs" in said


def test_no_limit_of_steps_is_none_and_not_a_negative_number(manager: TrainingStateManager) -> None:
    assert "or None for no limit" in require_named("max_steps", lambda: manager.epochs(1, max_steps=-1))


def test_numbers_of_numpy_are_numbers(accelerator: Accelerator, tmp_path: Path) -> None:
    manager = TrainingStateManager(accelerator, tmp_path, keep_last=np.int64(2))  # type: ignore[arg-type]
    try:
        assert list(manager.epochs(np.float64(2.0), max_steps=np.int64(3))) == [
            0,
            1,
        ]  # a number of epochs of Trainer's is one
        assert manager.save(metric=torch.tensor(0.5), epoch_is_over=np.bool_(True)).is_dir()  # type: ignore[arg-type]
    finally:
        manager.close()


def test_latest_checkpoint_of_what_is_no_output_directory_is_an_error(tmp_path: Path) -> None:
    checkpoint, file = saved_run(tmp_path / "run", step=2), tmp_path / "file"
    file.touch()
    assert latest_checkpoint(tmp_path / "absent") is None
    with pytest.raises(NotADirectoryError, match="file is a file; give the output directory"):
        latest_checkpoint(file)
    for blocked in (file, file / "run"):  # the accelerator is looked at before
        with pytest.raises(NotADirectoryError, match=r"directory: .*file is a file; give the output directory"):
            TrainingStateManager(Accelerator(cpu=True), blocked)
    with pytest.raises(ValueError, match="checkpoint-2 is one checkpoint; give its parent"):
        latest_checkpoint(checkpoint)


def test_output_directory_in_the_place_of_a_checkpoint_is_named_with_its_newest(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    output = saved_run(tmp_path / "run", step=2).parent
    manager = TrainingStateManager(accelerator, tmp_path / "loop")
    said = "run is an output directory, not a checkpoint: .*such as checkpoint-2"
    try:
        with pytest.raises(ValueError, match=said):
            manager.resume(output)
    finally:
        manager.close()
    with pytest.raises(ValueError, match=said):
        new_trainer(tmp_path / "other", LifecycleCallback()).train(resume_from_checkpoint=str(output))


def test_checkpoint_of_the_other_host_is_refused_and_says_who_saved_it(
    accelerator: Accelerator, tmp_path: Path
) -> None:
    of_trainer = saved_run(tmp_path / "trainer", step=2)
    manager = TrainingStateManager(accelerator, tmp_path / "loop")
    try:
        accelerator.prepare(Net())
        of_loop = manager.save()
        with pytest.raises(ResumeMismatch, match="it was saved by Trainer, and this is a custom loop"):
            manager.resume(of_trainer)
    finally:
        manager.close()
    with pytest.raises(ResumeMismatch, match="it was saved by a custom loop, and this is Trainer"):
        new_trainer(tmp_path / "other", LifecycleCallback()).train(resume_from_checkpoint=str(of_loop))


def test_checkpoints_of_trainer_and_of_a_loop_are_not_compared(
    accelerator: Accelerator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_trainer = saved_run(tmp_path / "trainer", step=2)
    manager = TrainingStateManager(accelerator, tmp_path / "loop")
    model = accelerator.prepare(Net())
    model(**next(iter(DataLoader(Rows(), batch_size=2))))
    of_loop = manager.save()
    manager.close()
    for pair in ((of_trainer, of_loop), (of_loop, of_trainer)):
        with pytest.raises(SystemExit) as ended:
            command_line.app(["diff", *map(str, pair)])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "was saved by Trainer and" in said
        assert "give two checkpoints of the same kind" in said


@pytest.mark.parametrize("given", ["", 5, b"checkpoint-2"])
def test_checkpoint_that_is_no_path_is_refused_with_the_name_of_the_argument(tmp_path: Path, given: Any) -> None:
    trainer = new_trainer(tmp_path, LifecycleCallback())
    with pytest.raises((TypeError, ValueError), match="resume_from_checkpoint must be a path, such as what latest_"):
        trainer.train(resume_from_checkpoint=given)
