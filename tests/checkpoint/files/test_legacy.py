"""Files of the original project load as they are, and nothing is executed for it."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
import torch

from hf_lifecycle.errors import StateFileError
from hf_lifecycle.training_state import TrainingStateManager


def original_state(**changes):
    """What the original project gave to torch.save."""
    return {
        "epoch": 4,
        "step": 400,
        "best_metric": 0.25,
        "custom_state": {"lr": 0.1, "history": [np.float64(0.5), np.float32(0.25)], "ema": np.arange(3.0)},
        "torch_rng_state": torch.get_rng_state(),
        "numpy_rng_state": np.random.get_state(),
        "python_rng_state": random.getstate(),
    } | changes


def draws():
    return [random.random(), random.gauss(0, 1), np.random.normal(), np.random.rand(), torch.rand(3).tolist()]


def as_numpy_1(path):
    """Rename NumPy's module in the pickle to what NumPy 1 wrote."""
    import zipfile

    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in parts.items():
            new, old = b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
            archive.writestr(name, content.replace(new, old) if name.endswith(".pkl") else content)


@pytest.mark.parametrize("numpy_1", [False, True])
@pytest.mark.parametrize("name", ["state.pt", "state.pth", "state"])
def test_a_file_of_the_original_continues_every_generator(tmp_path, name, numpy_1):
    path = tmp_path / name
    random.gauss(0, 1), np.random.normal()  # each keeps half of a pair
    torch.save(original_state(), path)
    if numpy_1:
        as_numpy_1(path)
    expected = draws()
    draws()
    manager = TrainingStateManager()
    state = manager.load_state(path)
    assert draws() == expected
    assert sorted(state) == ["best_metric", "custom_state", "epoch", "step"]
    assert (state["epoch"], state["step"], state["best_metric"]) == (4, 400, 0.25)
    assert state["custom_state"]["history"] == [0.5, 0.25]
    assert state["custom_state"]["ema"].tolist() == [0, 1, 2]
    assert (manager.best_metric, manager.best_epoch) == (0.25, 4)
    assert manager.is_best(0.3) is False
    assert manager.is_best(0.2) is True


def test_a_best_metric_that_was_saved_as_a_scalar_or_a_tensor_is_a_number(tmp_path):
    for metric in (np.float32(0.5), torch.tensor(0.5), None):
        torch.save(original_state(best_metric=metric, custom_state={}), tmp_path / "a.pt")
        state = TrainingStateManager().load_state(tmp_path / "a.pt", restore_rng=False)
        assert state["best_metric"] == (None if metric is None else 0.5)
        assert type(state["best_metric"]) in (float, type(None))


def test_a_file_from_a_machine_with_gpus_loads_where_there_are_none(tmp_path, caplog):
    devices = [torch.zeros(16, dtype=torch.uint8)] * 2
    torch.save(original_state(cuda_rng_state=devices[0], cuda_rng_state_all=devices), tmp_path / "a.pt")
    expected = draws()
    TrainingStateManager().load_state(tmp_path / "a.pt")
    assert draws() == expected
    if not torch.cuda.is_available():
        assert "cuda:0, cuda:1" in caplog.text


class Harmless:
    """Any class of the user's."""


class Gadget:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
def test_an_object_in_the_custom_state_is_refused_by_its_name_and_never_made(tmp_path, name):
    for value, named in ((Harmless(), "Harmless"), (Gadget(tmp_path / "made"), "posix.mkdir")):
        torch.save(original_state(custom_state={"x": value}), tmp_path / name)
        before = draws_state()
        with pytest.raises((StateFileError, ValueError), match=named if name == "a.pt" else name):
            TrainingStateManager().load_state(tmp_path / name)
        assert draws_state() == before
    assert not (tmp_path / "made").exists()


def draws_state():
    return (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes())


BAD = {
    "no numpy": ("numpy_rng_state", None),
    "short numpy": ("numpy_rng_state", ("MT19937", np.zeros(3, np.uint32), 0, 0, 0.0)),
    "other numpy": ("numpy_rng_state", ("PCG64", np.zeros(624, np.uint32), 0, 0, 0.0)),
    "short python": ("python_rng_state", (3, (1, 2, 3), None)),
    "text for python": ("python_rng_state", "abc"),
    "short torch": ("torch_rng_state", torch.zeros(3, dtype=torch.uint8)),
    "none for torch": ("torch_rng_state", None),
    "epoch": ("epoch", "four"),
    "metric": ("best_metric", "good"),
    "custom": ("custom_state", [1]),
}


@pytest.mark.parametrize(("key", "value"), BAD.values(), ids=BAD)
def test_a_state_that_is_none_is_refused_and_changes_nothing(tmp_path, key, value):
    torch.save(original_state(**{key: value}), tmp_path / "a.pt")
    manager = TrainingStateManager()
    manager.is_best(0.5)
    before = draws_state()
    with pytest.raises(StateFileError, match=r"a\.pt: "):
        manager.load_state(tmp_path / "a.pt")
    assert draws_state() == before
    assert manager.best_metric == 0.5


def test_an_array_of_objects_is_never_built_from_bytes(tmp_path):
    class Scalar:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (np.dtype("O"), b"\x41" * 8)

    torch.save(original_state(custom_state={"x": Scalar()}), tmp_path / "a.pt")
    with pytest.raises(StateFileError, match=r"ObjectDType|not a NumPy scalar of a number"):
        TrainingStateManager().load_state(tmp_path / "a.pt")


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps(original_state()))
    with pytest.raises(StateFileError):
        TrainingStateManager().load_state(tmp_path / "a.pt")
