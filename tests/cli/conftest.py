"""One real run for all tests of this folder, and copies of it to damage."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trainer.runs import new_trainer
from typer.testing import CliRunner, Result

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.cli.app import app


@pytest.fixture(scope="session")
def original(tmp_path_factory: Any) -> Path:
    """A run of 8 steps with 4 checkpoints; nobody writes into it."""
    directory: Path = tmp_path_factory.mktemp("cli") / "run"
    settings = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_loss"}
    new_trainer(directory, LifecycleCallback(patience=5), max_steps=8, **settings).train()
    return directory


@pytest.fixture
def run(original: Path, tmp_path: Path) -> Path:
    """A copy of the run that a test may do with as it likes."""
    return Path(shutil.copytree(original, tmp_path / "run"))


@pytest.fixture
def invoke() -> Callable[..., Result]:
    """Call the command line. An exception that would be a traceback fails the test."""

    def call(*arguments: object) -> Result:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "80"})
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result

    return call
