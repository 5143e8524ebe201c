"""Every error carries its facts and its message wherever it goes."""

from __future__ import annotations

import copy
import errno
import pickle
from typing import Any

import pytest

from hf_lifecycle import errors

FACTS: dict[str, Any] = {
    "LifecycleError": ("two checkpoints cannot be compared",),
    "StateFileError": ("state.safetensors", "cut off"),
    "UnsafeStateError": ("custom_state['fn']", int),
    "StateMismatch": ("EarlyStopping", ["counter"], ["surprise"]),
    "MetricNotFound": ("eval_f1", ["eval_loss"]),
    "ResumeMismatch": ("checkpoint-4", ["another seed"], "see the docs"),
    "UnsupportedTraining": (["no checkpoints"],),
    "DamagedCheckpoint": ("checkpoint-4", ["optimizer.pt: missing"], "checkpoint-2"),
    "NoUsableCheckpoint": ("run", ["cut off", "missing"]),
    "NoCommonCheckpoint": ("run", ["rank 0, here:/run: no checkpoint"]),
    "SaveFailed": ("checkpoint-4", OSError(errno.EIO, "read error")),
    "DirectoryInUse": ("run", "process 7"),
    "NotEnoughSpace": ("run", 2_000, 1_000),
    "RankUnreachable": ("votes", [1, 2], 30.0),
    "RankFailed": ("a save", {1: "no space"}),
    "MirrorError": ("s3://there", "no such bucket"),
    "MirrorOfAnotherRun": ("s3://there", "it is of another run"),
}


def test_every_error_is_in_this_list() -> None:
    assert {*FACTS} == set(errors.__all__)


@pytest.mark.parametrize("name", FACTS)
def test_an_error_is_the_same_in_another_process(name: str) -> None:
    error = getattr(errors, name)(*FACTS[name])
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (type(again), str(again)) == (type(error), str(error))
        assert repr(vars(again)) == repr(vars(error))


def test_what_an_error_tells_does_not_change_with_its_makers_list() -> None:
    problems = ["cut off"]
    error = errors.NoUsableCheckpoint("run", problems)
    problems.append("missing")
    assert error.problems == ("cut off",)


def test_no_space_is_the_systems_error_too() -> None:
    error = errors.NotEnoughSpace("run", None, 5)
    assert (error.errno, error.strerror, error.filename) == (errno.ENOSPC, str(error), None)
