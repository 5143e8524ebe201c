"""A user's objects can be copied, pickled and sent away where they can be without us, and the copies are plain ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from hf_lifecycle import TrainingStateManager
from tests.accelerator.tiny import Counter


def _pickled(one: Any) -> Any:
    return pickle.loads(pickle.dumps(one))


COPIES: dict[str, Callable[[Any], Any]] = {"copy": copy.copy, "pickle": _pickled}


def _leave_note(models: Any, weights: Any, folder: str) -> None:
    """A save hook of the user's."""
    Path(folder, "note").write_text("saved")


@pytest.mark.parametrize("how", COPIES)
def test_copy_of_an_accelerator_is_none_of_the_managers(how: str, tmp_path: Path) -> None:
    accelerator, own = Accelerator(cpu=True), Counter(3)
    accelerator.register_for_checkpointing(own)
    accelerator.register_save_state_pre_hook(_leave_note)
    before = set(vars(accelerator))
    manager = TrainingStateManager(accelerator, tmp_path / "run")
    copied = COPIES[how](accelerator)

    copied.save_state(tmp_path / "copied")
    files = {path.name for path in (tmp_path / "copied").rglob("*")}
    assert files == {"note", "custom_checkpoint_0.pkl", "random_states_0.pkl"}
    copied.load_state(tmp_path / "copied")
    TrainingStateManager(copied, tmp_path / "another run").close()  # the copy has none yet

    accelerator.save_state(tmp_path / "original")
    assert (tmp_path / "original" / "lifecycle").is_dir()
    manager.close()
    assert set(vars(accelerator)) == set(vars(_pickled(accelerator))) == before
