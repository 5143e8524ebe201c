"""What TrainingStateManager does in a loop, refuses, and says; exactness is test_loop_matrix.py's."""

from __future__ import annotations

import logging
import pickle
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from hf_lifecycle import (
    DamagedCheckpoint,
    EarlyStopping,
    KeepBest,
    NoUsableCheckpoint,
    ResumeMismatch,
    StateFileError,
    TrainingStateManager,
    UnsupportedTraining,
)
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.store import staging_folder
from hf_lifecycle.checkpoint.files.additions import LOOP
from hf_lifecycle.checkpoint.inspection.receipt import last_receipt_of, read_receipts
from tests.trainer.runs import changed_state, flip, reseal
from tests.trainer.test_save_failures import files_of_at_most

from .tiny import Counter, Script, new_script


def saved(directory: Path, *, step: int = 8, **settings: Any) -> Path:
    """A run that was broken off after its save at ``step``; returns the checkpoint."""
    new_script(directory, **settings).run(save_at=(step,), stop_at=step).manager.close()
    return directory / f"checkpoint-{step}"


def drawn() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_plain_save_state_and_load_state_carry_everything(tmp_path: Path) -> None:
    objects = {"a": Counter(1), "b": Counter(2), "stopping": EarlyStopping(patience=1)}
    script = new_script(None, objects=objects)
    script.run(stop_at=4)
    objects["stopping"].step(0.5)
    for _ in script.manager.epochs(2):
        pass
    script = new_script(None, objects=objects)
    for epoch in script.manager.epochs(2):
        for number, batch in enumerate(script.manager.batches(script.loader)):
            script.train(batch)
            if (epoch, number) == (1, 2):
                script.accelerator.save_state(str(tmp_path / "by accelerate"))
                next_numbers, weights = drawn(), script.digests()
    rest = {"b": Counter(), "stopping": EarlyStopping(patience=1), "a": Counter()}  # by name, not by place
    again = new_script(None, objects=rest)
    again.accelerator.load_state(str(tmp_path / "by accelerate"))
    assert drawn() == next_numbers
    assert again.digests() == weights
    assert (rest["a"].count, rest["b"].count, rest["stopping"].best_metric) == (1, 2, 0.5)
    assert (again.manager.progress.epoch, again.manager.progress.step, again.manager.progress.batch) == (1, 9, 3)
    assert [len(list(again.manager.batches(again.loader))) for _ in again.manager.epochs(2)] == [3]


def test_save_in_the_middle_of_an_accumulation_is_refused_with_the_place_for_it(tmp_path: Path) -> None:
    script = new_script(tmp_path, steps=3)
    for batch in script.manager.batches(script.loader):
        script.train(batch)
        if not script.accelerator.sync_gradients:
            with pytest.raises(UnsupportedTraining, match=r"accumulation \(batch 1 of 3\).*sync_gradients is True"):
                script.manager.save()
            with pytest.raises(UnsupportedTraining, match="accumulation"):  # by accelerate's own method too
                script.accelerator.save_state(str(tmp_path / "x"))
            break
    assert not list(tmp_path.glob("checkpoint-*"))


def test_save_within_an_evaluation_is_refused(tmp_path: Path) -> None:
    script = new_script(tmp_path)
    with script.manager.evaluating(), pytest.raises(UnsupportedTraining, match="evaluating"):
        script.manager.save()


def test_batches_after_a_save_outside_them_are_named_unless_the_epoch_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(tmp_path)
    for _ in script.manager.epochs(1):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
        script.manager.save(epoch_is_over=False)
        for batch in script.manager.batches(script.loader):
            script.train(batch)
        script.manager.save()
        assert "not exact" not in caplog.text
        for batch in script.manager.batches(script.loader):
            script.train(batch)
        assert "not exact: batches() after save() in one epoch" in caplog.text
    assert script.manager.progress.epoch == 1


def test_an_object_that_changes_after_the_save_at_an_epochs_end_is_saved_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    counter = Counter()
    script = new_script(tmp_path, objects={"counter": counter})
    epochs = script.manager.epochs(2)
    next(epochs)
    for batch in script.manager.batches(script.loader):
        script.train(batch)
    script.manager.save()
    counter.count += 1
    assert next(epochs) == 1
    assert "since the program changes counter.count after it" in caplog.text
    script.manager.close()
    again = Counter()
    new_script(tmp_path, objects={"counter": again}).manager.resume()
    assert again.count == counter.count


def test_checkpoints_are_rotated_and_judged(tmp_path: Path) -> None:
    script = new_script(tmp_path, keep=KeepBest(1, "min"))
    for number, batch in enumerate(script.manager.batches(script.loader)):
        script.train(batch)
        path = script.manager.save(metric=[0.5, 0.1, 0.4, 0.3, 0.2, 0.6][number])
        assert path == tmp_path / f"checkpoint-{number + 1}"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert read_manifest(tmp_path / "checkpoint-2").metric.value == 0.1
    told = [event.event for event in read_events(tmp_path)]
    assert (told.count("committed"), told.count("removed")) == (6, 4)


def test_a_run_that_has_ended_gives_no_epochs(tmp_path: Path) -> None:
    script = new_script(tmp_path)
    script.run()
    script.manager.save()
    script.manager.close()
    again = new_script(tmp_path)
    assert again.manager.resume() == tmp_path / "checkpoint-12"
    assert list(again.manager.epochs(2)) == []
    assert list(again.manager.epochs(3)) == [2]  # and more of them where more are wanted


def test_max_steps_ends_both_loops_and_more_of_them_go_on(tmp_path: Path) -> None:
    def run(limit: int) -> list[int]:
        script = new_script(tmp_path)
        script.manager.resume()
        steps = []
        for _ in script.manager.epochs(9, max_steps=limit):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
                steps.append(script.manager.progress.step)
        script.manager.save()
        script.manager.close()
        return steps

    assert run(8) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert run(8) == []
    assert run(10) == [9, 10]


def test_a_stopped_run_is_not_trained_on(tmp_path: Path) -> None:
    script = new_script(tmp_path, objects={"stopping": EarlyStopping(patience=0)})
    for _ in script.manager.epochs(5):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
        script.manager._run._objects["stopping"].step(float("nan"))
        script.manager.save()
    assert script.manager.progress.epoch == 1
    script.manager.close()
    again = new_script(tmp_path, objects={"stopping": EarlyStopping(patience=0)})
    again.manager.resume()
    assert list(again.manager.epochs(5)) == []
    told = [(event.event, event.facts["step"]) for event in read_events(tmp_path)]
    assert told[told.index(("stopped", 6)) + 1] == ("ended", 6)


def test_numbers_of_numpy_in_the_users_own_registered_objects_are_admitted(tmp_path: Path) -> None:
    class Registered:
        def __init__(self, values: Any) -> None:
            self.state = {"values": values}

        def state_dict(self) -> Any:
            return self.state

        def load_state_dict(self, state: Any) -> None:
            self.state = state

    script = new_script(tmp_path)
    script.accelerator.register_for_checkpointing(Registered([np.arange(3.0), np.float64(0.5), np.arange(2)]))
    script.manager.save()
    script.manager.close()
    again, own = new_script(tmp_path), Registered(None)
    again.accelerator.register_for_checkpointing(own)
    again.manager.resume()
    assert np.array_equal(own.state["values"][0], np.arange(3.0))
    assert own.state["values"][1] == 0.5


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"])
@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_nothing_hostile_is_unpickled(name: str, how: str, tmp_path: Path) -> None:
    checkpoint, marker = saved(tmp_path / "run"), tmp_path / "it ran"
    if how == "torch":
        torch.save({"x": _Hostile(marker)}, checkpoint / name)
    else:
        (checkpoint / name).write_bytes(pickle.dumps(_Hostile(marker)))
    reseal(checkpoint)
    again = new_script(tmp_path / "run")
    before = again.digests()
    with pytest.raises(StateFileError, match=name):
        again.manager.resume()
    with pytest.raises(StateFileError, match=name):
        again.accelerator.load_state(str(checkpoint))
    assert not marker.exists()
    assert again.digests() == before


def test_what_differs_is_named_and_refused_or_admitted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, objects={"old": Counter()})
    with pytest.raises(ResumeMismatch) as refused:
        new_script(tmp_path, steps=2, batch_size=2, objects={"new": Counter()}).manager.resume()
    for words in (
        "gradient_accumulation_steps: 1 -> 2 (breaks exactness)",
        "loader 0, batch_size: 4 -> 2 (breaks exactness)",
        "objects: 'new' has no saved state",
        "objects: 'old' was saved, but is not given now",
        "strict=False",
    ):
        assert words in str(refused.value)
    again = new_script(tmp_path, steps=2, strict=False)
    assert again.manager.resume() is not None
    assert "not exact: gradient_accumulation_steps: 1 -> 2" in caplog.text


def test_what_accelerate_loads_is_proved(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    checkpoint = saved(tmp_path)
    weights = load_file(checkpoint / "model.safetensors")
    weights["layers.0.bias"][0] += 1.0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    reseal(checkpoint)
    with pytest.raises(ResumeMismatch, match=r"model: model 0\.layers\.0\.bias differs from what was saved"):
        new_script(tmp_path).manager.resume()


@pytest.mark.parametrize("part", ["position", "best"])
def test_a_state_of_a_version_that_has_other_keys_names_the_version(part: str, tmp_path: Path) -> None:
    with changed_state(saved(tmp_path), LOOP) as tree:
        tree["environment"]["hf-lifecycle"] = "0.0.7"
        del tree["parts"][part]
    with pytest.raises(ResumeMismatch, match=rf"(?s)lifecycle 0\.0\.7 saved it.*{part}.*install hf-lifecycle 0\.0\.7"):
        new_script(tmp_path).manager.resume()


def test_a_state_of_version_0_1_resumes_exactly(tmp_path: Path) -> None:
    whole = new_script(tmp_path / "whole", generators=1).run(save_at=(8,)).digests()
    with changed_state(saved(tmp_path / "broken", generators=1), LOOP) as tree:
        tree["environment"]["hf-lifecycle"] = "0.1.0"
        for loader in tree["parts"]["position"]["loaders"].values():
            del loader["objects"]["next"]
    script = new_script(tmp_path / "broken")
    script.manager.resume()
    assert script.run().digests() == whole


def test_a_resume_leaves_a_receipt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    objects = {"counter": Counter()}
    checkpoint = saved(tmp_path, objects=objects)
    assert read_receipts(tmp_path) == []
    script = new_script(tmp_path, objects=objects)
    with caplog.at_level(logging.INFO):
        script.manager.resume()
    script.manager.close()
    assert f"resumed from {checkpoint} at step 8: epoch 1, batch 2; exact; verified " in caplog.text
    (receipt,) = read_receipts(tmp_path)
    assert receipt == last_receipt_of(checkpoint, read_manifest(checkpoint).attempt)
    begun = [event.facts["attempt"] for event in read_events(tmp_path) if event.event == "resumed"]
    assert ([receipt["attempt"]], receipt["checkpoint"], receipt["step"]) == (begun, "checkpoint-8", 8)
    assert receipt["verified"]["files"] == len(read_manifest(checkpoint).files)
    assert {"objects: counter"} < set(receipt["restored"])
    assert (receipt["proved"]["model tensors"], receipt["repaired"]) == (4, [])
    assert (receipt["exact"], receipt["why_not_exact"], receipt["differences"]) == (True, [], [])
    other = new_script(tmp_path, batch_size=8, objects=objects, strict=False)
    other.manager.resume()
    other.manager.close()
    (inexact,) = [one for one in read_receipts(tmp_path) if one["attempt"] != receipt["attempt"]]
    assert not inexact["exact"]
    assert any("batch_size" in why for why in inexact["why_not_exact"])
    assert {one["grade"] for one in inexact["differences"]} == {"breaks exactness"}


def test_a_loop_logs_one_line_a_save_and_one_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="hf_lifecycle")
    for steps in (4, 8), (12,):
        script = new_script(tmp_path, keep_last=1)
        script.manager.resume()
        script.run(save_at=steps, stop_at=steps[-1]).manager.close()
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_lifecycle")]
    first, *lines = [line.split(": ")[-1] if ": saved" in line else line.split(" from ")[0] for line in said]
    assert first.endswith("no checkpoint yet, so training starts")
    assert lines == ["saved step 4", "saved step 8", "resumed", "saved step 12"]


@pytest.mark.parametrize("name", ["model.safetensors", "random_states_0.pkl", "lifecycle/rank-00000.safetensors"])
@pytest.mark.parametrize("how", ["resume", "load_state"])
def test_damage_in_a_checkpoint_that_is_named_is_found_before_anything_is_loaded(
    tmp_path: Path, name: str, how: str
) -> None:
    new_script(tmp_path).run(save_at=(4, 8), stop_at=9).manager.close()
    damaged = tmp_path / "checkpoint-4"
    flip(damaged / name, -1)
    again = new_script(tmp_path)
    before = again.digests()
    with pytest.raises(DamagedCheckpoint, match=f"{name}: digest differs") as caught:
        again.manager.resume(damaged) if how == "resume" else again.accelerator.load_state(str(damaged))
    assert again.digests() == before
    assert caught.value.newest == tmp_path / "checkpoint-8"


def test_newest_checkpoint_that_is_named_and_damaged_was_moved_aside(tmp_path: Path) -> None:
    new_script(tmp_path).run(save_at=(4, 8), stop_at=9).manager.close()
    (tmp_path / "checkpoint-8" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(DamagedCheckpoint, match="moved to damaged-checkpoint-8") as caught:
        new_script(tmp_path).manager.resume(tmp_path / "checkpoint-8")
    assert caught.value.newest == tmp_path / "checkpoint-4"


def test_loop_whose_checkpoints_are_all_damaged_never_starts_anew(tmp_path: Path) -> None:
    (saved(tmp_path) / "model.safetensors").write_bytes(b"")
    for _ in range(2):  # the first start moves it aside
        script = new_script(tmp_path)
        with pytest.raises(NoUsableCheckpoint, match="damaged-checkpoint-8: damaged, and moved aside"):
            script.manager.resume()
        script.manager.close()


def test_loop_goes_on_over_a_save_that_fails_and_the_log_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def ended(directory: Path, *, fails: bool) -> dict[str, str]:
        script = new_script(directory, seed=3)
        script.accelerator.prepare(torch.nn.Linear(100, 100))  # larger than the limit, and than all other files
        torch.manual_seed(5)
        for layer in script.model.modules():
            getattr(layer, "reset_parameters", lambda: None)()
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            if script.manager.progress.step == 4 and fails:
                with files_of_at_most(20_000), pytest.raises(Exception, match="File too large"):
                    script.manager.save()
            elif script.manager.progress.step in (2, 4, 6):
                script.manager.save()
        script.manager.close()
        return script.digests()

    assert ended(tmp_path, fails=True) == ended(tmp_path / "whole", fails=False)
    assert "checkpoint-4: not saved: model_1.safetensors: Error while serializing" in caplog.text
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-6"]
    assert list(staging_folder(tmp_path).iterdir()) == []
    failed = [event.facts for event in read_events(tmp_path) if event.event == "failed"]
    assert [facts["step"] for facts in failed] == [4]
    assert "model_1.safetensors" in str(failed[0]["why"])


def test_files_of_two_saves_are_refused(tmp_path: Path) -> None:
    script = new_script(tmp_path).run(save_at=(4, 8), stop_at=8)
    script.manager.close()
    shutil.copy(tmp_path / "checkpoint-4" / "custom_checkpoint_0.pkl", tmp_path / "checkpoint-8")
    reseal(tmp_path / "checkpoint-8")
    with pytest.raises(ResumeMismatch, match="files belong to two different saves"):
        new_script(tmp_path).manager.resume()


def test_a_load_within_the_loop_ends_the_loops_that_run(tmp_path: Path) -> None:
    script = new_script(tmp_path)
    batches = script.manager.batches(script.loader)
    script.train(next(batches))
    script.manager.save()
    script.train(next(batches))
    script.manager.resume()
    with pytest.raises(RuntimeError, match="loaded within the loop"):
        next(batches)
    assert script.manager.progress.batch == 1
    assert len(list(script.manager.batches(script.loader))) == 5


def test_an_evaluation_moves_no_random_numbers(tmp_path: Path) -> None:
    script = new_script(tmp_path)
    with script.manager.evaluating():
        first = drawn()
    assert drawn() == first


def test_misuse_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass accelerator="):
        TrainingStateManager(mirror=tmp_path)
    with pytest.raises(ValueError, match="directory="):
        TrainingStateManager(Accelerator(cpu=True), mirror=tmp_path)
    script = new_script(tmp_path)
    with pytest.raises(ValueError, match="has a TrainingStateManager already"):
        TrainingStateManager(script.accelerator, tmp_path)
    with pytest.raises(ValueError, match="pass one of them"):
        new_script(tmp_path, keep_last=1, keep=KeepBest(1, "min"))
    with pytest.raises(TypeError, match="no state_dict"):
        new_script(tmp_path, objects={"x": 1})
    with pytest.raises(ValueError, match="pass accelerator="):
        TrainingStateManager(directory=tmp_path)
    with pytest.raises(ValueError, match=r"TrainingStateManager\(accelerator, directory\)"):
        TrainingStateManager().resume()
    with pytest.raises(ValueError, match="needs a directory"):
        new_script(None).manager.save()
    batches = script.manager.batches(script.loader)
    next(batches)
    next(script.manager.batches(script.loader))
    with pytest.raises(RuntimeError, match="loader 0 is already being iterated"):
        next(batches)


def test_a_checkpoint_of_accelerate_alone_is_refused_with_a_way_on(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.save_state(str(tmp_path / "stock"))
    with pytest.raises(ResumeMismatch, match="saved without TrainingStateManager"):
        new_script(None).accelerator.load_state(str(tmp_path / "stock"))


def test_a_clock_that_goes_on_is_no_late_change(tmp_path: Path) -> None:
    stopping = EarlyStopping(patience=1000, patience_unit="seconds")
    script = new_script(tmp_path, objects={"stopping": stopping})
    epochs = []
    for epoch in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
        stopping.step(1.0)
        script.manager.save()
        epochs.append(epoch)
    assert epochs == [0, 1]


def test_folders_that_accelerate_names_itself_do_not_divert_a_save(tmp_path: Path) -> None:
    script = new_script(tmp_path)
    script.accelerator.project_configuration.automatic_checkpoint_naming = True
    script.accelerator.project_configuration.set_directories(str(tmp_path / "project"))
    checkpoint = script.manager.save()
    assert (checkpoint / "model.safetensors").is_file()
    assert not (tmp_path / "project").exists()
    assert script.accelerator.project_configuration.automatic_checkpoint_naming


@pytest.mark.parametrize(
    ("given", "error", "told"),
    [
        ({"accelerator": 0}, TypeError, "accelerator must be an accelerate.Accelerator, got 0"),
        ({"objects": 3}, TypeError, "objects must be a mapping of names to objects, got 3"),
        ({"objects": {"a": torch.nn.Linear}}, TypeError, "Linear is a class; pass an instance"),
        ({"strict": "no"}, TypeError, "strict must be True or False, got 'no'"),
    ],
)
def test_argument_of_another_kind_is_an_error_that_names_it(
    given: dict[str, Any], error: type[Exception], told: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=re.escape(told)):
        TrainingStateManager(**{"accelerator": Accelerator(cpu=True), "directory": tmp_path, **given})


def test_loop_of_a_manager_without_an_accelerator_is_refused_with_a_way_on() -> None:
    manager = TrainingStateManager()
    said = (
        "this manager was created without an accelerator: create TrainingStateManager(accelerator, directory) for a "
        "loop"
    )
    for use in (manager.resume, lambda: manager.epochs(1), lambda: manager.progress, manager.save):
        with pytest.raises(ValueError, match=re.escape(said)):
            use()


def test_empty_name_of_a_checkpoint_is_refused(tmp_path: Path) -> None:
    manager = TrainingStateManager(Accelerator(cpu=True), tmp_path)
    try:
        with pytest.raises(ValueError, match="checkpoint must be a path, and is empty"):
            manager.resume("")
    finally:
        manager.close()


def _grown(script: Any) -> None:
    script.model.more = torch.nn.Linear(1, 1)


def _narrowed(script: Any) -> None:
    script.model.layers[0] = torch.nn.Linear(2, 3)


def _buffered(script: Any) -> None:
    script.model.register_buffer("count", torch.zeros(1))


def _regrouped(script: Any) -> None:
    groups = script.optimizer.optimizer.param_groups
    groups[0]["params"].pop()


def _of_another_class(script: Any) -> None:
    script.optimizer.optimizer = torch.optim.SGD(script.model.parameters(), lr=1e-2)


def _of_like_settings(script: Any) -> None:
    script.optimizer.optimizer = torch.optim.Adamax(script.model.parameters(), lr=1e-2)


def _registered(script: Any) -> None:
    script.accelerator.register_for_checkpointing(Counter())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_grown, "model 0.more.bias, model 0.more.weight: here, but not in the checkpoint"),
        (_buffered, "model 0.count: here, but not in the checkpoint"),
        (_narrowed, "model 0.layers.0.weight has the shape"),
        (_regrouped, "optimizer 0 has one group of 3 parameters, and had one group of 4 when it was saved"),
        (_of_another_class, "optimizer 0 is of the class SGD, which cannot step with what was saved: no momentum"),
        (_of_like_settings, "optimizer 0 is of the class Adamax, which cannot step with what was saved: no exp_inf"),
        (_registered, "register_for_checkpointing() was given 1 objects beside the manager, and 0 when it was saved"),
    ],
)
def test_what_accelerate_cannot_load_is_named_before_anything_is_loaded(
    change: Any, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = saved(tmp_path)
    again = new_script(tmp_path)
    change(again)
    before = again.digests()
    with pytest.raises(ResumeMismatch, match=re.escape(said)) as raised:
        again.manager.resume()
    assert len(str(raised.value).splitlines()) <= 10
    assert "load model.safetensors yourself" in str(raised.value)
    assert again.digests() == before
    again.manager.close()
    lenient = new_script(tmp_path, strict=False)
    change(lenient)
    with pytest.raises((RuntimeError, ValueError, ResumeMismatch)) as refused:  # or accelerate's own
        _ = lenient.manager.resume(checkpoint), lenient.run()
    assert said in f"{caplog.text}{refused.value}"
    assert isinstance(refused.value, ResumeMismatch) is said.startswith("optimizer")


@pytest.mark.parametrize("wait", [True, False])
def test_save_and_resume_after_close_are_errors_and_write_nothing(wait: bool, tmp_path: Path) -> None:
    script = new_script(tmp_path).run(save_at=(4,), stop_at=4)
    script.manager.close()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=re.escape("save() after close(): create a new TrainingStateManager")):
        script.manager.save(wait=wait)
    with pytest.raises(ValueError, match=re.escape("resume() after close()")):
        script.manager.resume()
    with pytest.raises(ValueError, match=re.escape("epochs() after close(): create a new TrainingStateManager")):
        script.manager.epochs(3)
    script.manager.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_metric_that_is_no_number_never_makes_a_best_checkpoint_and_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(tmp_path, keep=KeepBest(1, "min"))
    metrics = iter([float("nan"), 3.0, float("-inf"), 2.0, float("nan"), 4.0])
    for _ in script.manager.epochs(1):
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            script.manager.save(metric=next(metrics))
    script.manager.close()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    assert caplog.text.count("not a finite number, so this checkpoint is never the best one") == 3


def test_run_that_neither_saves_nor_resumes_leaves_no_file_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(tmp_path / "run").run(epochs=1)
    script.manager.close()
    assert not (tmp_path / "run").exists()
    assert caplog.text == ""


def test_optimizer_of_another_class_goes_on_with_a_warning_that_names_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path)
    other = new_script(tmp_path, optimizer_of=lambda model: torch.optim.Adam(model.parameters(), lr=1e-2))
    other.manager.resume()
    assert "not exact: optimizer 0 was of the class AdamW, and is of Adam now: make an AdamW to" in caplog.text
    (receipt,) = read_receipts(tmp_path)
    assert receipt["exact"] is False
    other.manager.close()


def test_changed_settings_of_optimizers_and_schedules_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def script(rate: float, size: int, *, prepares: bool, directory: Path) -> tuple[Script, Any]:
        one = new_script(directory, optimizer_of=lambda model: torch.optim.SGD(model.parameters(), lr=rate))
        schedule: Any = torch.optim.lr_scheduler.StepLR(one.optimizer.optimizer, size)
        return one, one.accelerator.prepare(schedule) if prepares else schedule

    for prepares, name in ((True, "scheduler 0"), (False, "StepLR of optimizer 0")):
        directory = tmp_path / str(prepares)
        begun, schedule = script(0.1, 2, prepares=prepares, directory=directory)
        begun.manager.resume()
        begun.run(save_at=[2], stop_at=2, change=lambda _, it=schedule: it.step(), change_at=1).manager.close()
        for _ in range(2):  # the second resume is from a checkpoint that a resumed run has saved
            caplog.clear()
            same, _ = script(0.1, 2, prepares=prepares, directory=directory)
            same.manager.resume()
            same.manager.close()
            assert caplog.text == ""
            other, schedule = script(0.2, 3, prepares=prepares, directory=directory)
            other.manager.resume()
            assert (
                f"no effect: lr of optimizer 0 0.1 -> 0.2, step_size of {name} 2 -> 3: the checkpoint restores the old "
                "values, as without this package, and the resume stays exact. To train with the new values, start a "
                "new run from these weights, or set them in optimizer.param_groups"
            ) in caplog.text
            assert schedule.state_dict()["step_size"] == 2
            other.run(save_at=[4], stop_at=4).manager.close()
