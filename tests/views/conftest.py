"""One real run for the tests of this folder: broken off, resumed, and stopped early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trainer.runs import break_off, new_trainer

from hf_lifecycle import LifecycleCallback, latest_checkpoint


@pytest.fixture(scope="session")
def finished(tmp_path_factory: Any) -> tuple[Path, LifecycleCallback]:
    """A directory and the callback of the attempt that ended; nobody writes into it."""
    directory: Path = tmp_path_factory.mktemp("views") / "run"
    settings = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 20, "save_total_limit": 2}
    break_off(new_trainer(directory, LifecycleCallback(patience=2, min_delta=0.5), **settings), step=5)
    callback = LifecycleCallback(patience=2, min_delta=0.5)
    new_trainer(directory, callback, **settings).train(resume_from_checkpoint=latest_checkpoint(directory))
    return directory, callback
