"""The training state of one's own loop: everything comes back, or nothing happens."""

from __future__ import annotations

import math
import random
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

import hf_lifecycle
from hf_lifecycle.checkpoint.files.statefile import read_structure, write_tree
from hf_lifecycle.errors import StateFileError, StateMismatch, UnsafeStateError
from hf_lifecycle.training_state import EarlyStopping, TrainingStateManager

SUFFIXES = (".pt", ".safetensors")


@pytest.fixture(params=SUFFIXES)
def path(request, tmp_path):
    return tmp_path / f"state{request.param}"


@pytest.fixture
def manager():
    return TrainingStateManager()


def draws():
    return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(2).tolist(), torch.rand(3).tolist()]


def process_state():
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def test_names_are_where_users_know_them():
    assert hf_lifecycle.TrainingStateManager is TrainingStateManager
    assert hf_lifecycle.EarlyStopping is EarlyStopping


@pytest.mark.parametrize("as_type", [str, Path])
def test_what_was_saved_is_loaded_with_exactly_four_keys(manager, path, as_type):
    custom = {"lr": 0.001, "ema": torch.ones(2), "names": ("a", {"b": None})}
    manager.save_state(as_type(path), 10, 1000, 0.85, custom)
    state = TrainingStateManager().load_state(as_type(path))
    assert list(state) == ["epoch", "step", "best_metric", "custom_state"]
    assert (state["epoch"], state["step"], state["best_metric"]) == (10, 1000, 0.85)
    assert torch.equal(state["custom_state"].pop("ema"), torch.ones(2))
    assert state["custom_state"] == {"lr": 0.001, "names": ("a", {"b": None})}


def test_without_best_and_custom_state_there_are_none_and_an_empty_dict(manager, path):
    manager.save_state(path, epoch=0, step=0)
    assert manager.load_state(path) == {"epoch": 0, "step": 0, "best_metric": None, "custom_state": {}}


def test_zero_is_a_metric_and_numbers_of_any_kind_are_stored_as_python_s(manager, path):
    manager.save_state(path, epoch=np.int64(3), step=torch.tensor(7), best_metric=torch.tensor(0.0))
    state = manager.load_state(path)
    assert [(type(v), v) for v in (state["epoch"], state["step"], state["best_metric"])] == [
        (int, 3),
        (int, 7),
        (float, 0.0),
    ]


@pytest.mark.parametrize("keeps_half_a_pair", [False, True])
def test_random_numbers_continue_as_if_nothing_had_happened(manager, path, keeps_half_a_pair):
    if keeps_half_a_pair:
        random.gauss(0, 1), np.random.normal()
    manager.save_state(path, epoch=5, step=1000)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    TrainingStateManager().load_state(path)
    assert draws() == expected


def test_saving_draws_no_random_number_and_loading_can_leave_the_generators_alone(manager, path):
    before = process_state()
    manager.save_state(path, epoch=5, step=1000)
    assert process_state() == before
    torch.rand(1), random.random(), np.random.rand()
    before = process_state()
    manager.load_state(path, restore_rng=False)
    assert process_state() == before


def test_missing_folders_are_made_and_a_missing_file_is_missing(manager, tmp_path):
    manager.save_state(tmp_path / "a" / "b" / "state.pt", epoch=0, step=0)
    manager.load_state(tmp_path / "a" / "b" / "state.pt")
    for name in ("none.pt", "none.safetensors", "none", "no/state.pt"):
        with pytest.raises(FileNotFoundError) as caught:
            manager.load_state(tmp_path / name)
        assert name in str(caught.value)
    assert not (tmp_path / "no").exists()


def test_a_bare_file_name_is_written_to_the_current_folder(manager, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manager.save_state("state.pt", epoch=0, step=0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]


def test_other_suffixes_are_refused_and_nothing_is_made(manager, tmp_path):
    for name in ("x/state", "x/state.bin"):
        with pytest.raises(ValueError, match=r"\.pt or \.safetensors"):
            manager.save_state(tmp_path / name, epoch=0, step=0)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises((ValueError, StateFileError)):
        manager.load_state(tmp_path / "notes.txt")
    assert not (tmp_path / "x").exists()


def test_a_custom_state_that_cannot_be_stored_safely_is_refused_by_its_key(manager, path):
    manager.save_state(path, epoch=1, step=1)
    with pytest.raises(UnsafeStateError) as caught:
        manager.save_state(path, epoch=2, step=2, custom_state={"ema": {"fn": lambda: 0}})
    assert caught.value.key == "custom_state['ema']['fn']"
    with pytest.raises(TypeError, match="custom_state must be a dict"):
        manager.save_state(path, epoch=2, step=2, custom_state=[1])
    assert manager.load_state(path)["epoch"] == 1


@pytest.mark.parametrize(
    "wrong", [{"epoch": "1"}, {"step": 1.5}, {"best_metric": "x"}, {"epoch": None}, {"step": math.nan}]
)
def test_arguments_that_are_no_numbers_are_named(manager, path, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        manager.save_state(**({"path": path, "epoch": 1, "step": 1} | wrong))
    assert not path.exists()


def test_an_ordered_custom_state_stays_one(manager, path):
    manager.save_state(path, 0, 0, custom_state=OrderedDict(a=1))
    assert manager.load_state(path)["custom_state"] == OrderedDict(a=1)


def test_the_best_survives_save_and_load(manager, path):
    assert manager.is_best(0.5)
    manager.save_state(path, epoch=3, step=30)
    resumed = TrainingStateManager()
    assert resumed.load_state(path)["best_metric"] == 0.5
    assert (resumed.best_metric, resumed.best_epoch) == (0.5, 3)
    assert resumed.is_best(0.6) is False
    assert resumed.is_best(0.4) is True
    with pytest.raises(ValueError, match="mode"):
        resumed.is_best(0.9, mode="max")


def test_a_best_that_was_only_passed_to_the_save_is_the_best(manager, path):
    manager.save_state(path, epoch=3, step=30, best_metric=0.85)
    assert manager.best_metric is None  # a save judges nothing
    resumed = TrainingStateManager()
    resumed.load_state(path)
    assert (resumed.best_metric, resumed.best_epoch) == (0.85, 3)
    assert resumed.is_best(0.9, mode="max") is True


def test_the_better_of_what_was_passed_and_what_was_seen_is_the_best(manager, path):
    manager.is_best(0.5)
    for passed, best in ((0.9, 0.5), (0.4, 0.4), (math.nan, 0.5)):
        manager.save_state(path, epoch=3, step=30, best_metric=passed)
        resumed = TrainingStateManager()
        state = resumed.load_state(path)
        assert state["best_metric"] == passed or math.isnan(passed)
        assert resumed.best_metric == best


@pytest.mark.parametrize("broken_after", range(5))
def test_a_loop_that_saves_before_it_judges_comes_to_the_same_verdicts_when_broken(path, broken_after):
    metrics = [0.9, 0.7, 0.8, 0.6, 0.65, 0.5]
    manager, verdicts = TrainingStateManager(), {}
    for epoch, metric in enumerate(metrics):
        manager.save_state(path, epoch=epoch, step=epoch, best_metric=metric)
        if epoch == broken_after:
            manager = TrainingStateManager()
            manager.load_state(path)
            continue
        verdicts[epoch] = manager.is_best(metric)
    expected = {0: True, 1: True, 2: False, 3: True, 4: False, 5: True}
    assert verdicts == {epoch: best for epoch, best in expected.items() if epoch != broken_after}
    assert manager.best_epoch == 5


def test_loading_forgets_what_the_manager_knew(manager, path):
    TrainingStateManager().save_state(path, epoch=0, step=0)
    manager.is_best(0.1, mode="max")
    manager.load_state(path)
    assert manager.state_dict() == {"best_metric": None, "best_epoch": None, "mode": None}


def test_a_save_that_fails_leaves_the_epoch_of_the_best_open(manager, tmp_path):
    manager.is_best(0.5)
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(IsADirectoryError):
        manager.save_state(tmp_path / "state.pt", epoch=1, step=1)
    assert manager.best_epoch is None


def test_state_dicts_and_attributes_are_those_of_the_original(manager):
    manager.best_metric = 0.5
    manager.best_epoch = 10
    assert manager.get_state_dict() == manager.state_dict() == {"best_metric": 0.5, "best_epoch": 10, "mode": None}
    other = TrainingStateManager()
    other.load_state_dict(manager.get_state_dict())
    other.load_state_dict({"best_metric": 0.25, "best_epoch": 11})
    assert (other.best_metric, other.best_epoch) == (0.25, 11)
    with pytest.raises(StateMismatch, match="surprise"):
        other.load_state_dict({"best_metric": 0.5, "best_epoch": 1, "surprise": 2})


@pytest.mark.parametrize(
    "change", [{"epoch": "x"}, {"rng": {}}, {"rng": None}, {"best": {}}, {"more": 1}, {"custom_state": 1}]
)
def test_a_whole_file_that_is_no_training_state_is_refused_and_changes_nothing(manager, path, change):
    manager.is_best(0.5)
    manager.save_state(path, epoch=0, step=0)
    from hf_lifecycle.checkpoint.files.statefile import read_tree

    write_tree(path, read_tree(path, kind="training_state") | change, kind="training_state")
    random.random(), np.random.rand(), torch.rand(1)
    before, best = process_state(), manager.state_dict()
    with pytest.raises(StateFileError, match=path.name):
        manager.load_state(path)
    assert (process_state(), manager.state_dict()) == (before, best)


def test_a_file_of_another_kind_is_refused(manager, path):
    write_tree(path, {"epoch": 1}, kind="callback")
    with pytest.raises(StateFileError, match="'callback' file"):
        manager.load_state(path)


def test_names_in_the_file_are_readable(manager, tmp_path):
    path = tmp_path / "a.safetensors"
    manager.save_state(path, epoch=2, step=20, custom_state={"ema": torch.ones(2)})
    assert read_structure(path)["epoch"] == 2
    assert {"rng/torch", "rng/numpy/words", "rng/python/words", "custom_state/ema"} <= set(
        __import__("safetensors").safe_open(path, "pt").keys()
    )


def test_a_generator_this_machine_lacks_is_told_once_and_the_rest_continues(manager, path, caplog):
    from hf_lifecycle.checkpoint.files.statefile import read_tree

    manager.save_state(path, epoch=0, step=0)
    tree = read_tree(path, kind="training_state")
    tree["rng"]["abacus:3"] = torch.zeros(4, dtype=torch.uint8)
    write_tree(path, tree, kind="training_state")
    expected = draws()
    manager.load_state(path)
    assert draws() == expected
    assert "no abacus:3" in caplog.text
