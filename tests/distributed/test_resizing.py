"""A run that goes on with another number of processes: an error, or by choice continued in the same order."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import preloaded

from .launching import ROOT, launch, told

pytestmark = pytest.mark.slow
SCRIPT = "tests.distributed.resizing_script"
GOES_ON = {"on_world_size_change": "continue"}


def attempt(ranks: int, place: Path, **given: Any) -> list[dict[str, Any]]:
    out = place.with_name(f"{place.name}-out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    if ranks > 1:
        code, output = launch("torchrun", ranks, SCRIPT, place, out, json.dumps(given))
        assert code == 0, output
    else:
        command = [sys.executable, "-m", SCRIPT, str(place), str(out), json.dumps(given)]
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        ended = preloaded.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    return told(out, ranks)


def steps_of(ranks: list[dict[str, Any]]) -> dict[int, list[float]]:
    """The examples that each step was of, whichever rank had them."""
    steps = {int(step) for one in ranks for step in one["seen"]}
    return {step: sorted(x for one in ranks for x in one["seen"][str(step)]) for step in sorted(steps)}


@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_two_processes_go_on_as_one_in_the_same_order_where_a_step_is_of_as_many_examples(
    tmp_path: Path, stream: bool
) -> None:
    alone = attempt(1, tmp_path / "alone", stream=stream, per_device_train_batch_size=8, max_steps=7)
    run = tmp_path / "run"
    both = attempt(2, run, stream=stream, per_device_train_batch_size=4, step=4, max_steps=7)
    whole = steps_of(alone)
    assert steps_of(both) == {step: whole[step] for step in range(4)}
    if not stream:
        (refused,) = attempt(1, run, per_device_train_batch_size=8, max_steps=7)
        assert "it was saved by 2 processes, and there are 1 now" in refused["error"]
        assert 'on_world_size_change="continue"' in refused["error"]
        (other,) = attempt(1, run, per_device_train_batch_size=4, max_steps=7, callback=GOES_ON)
        assert "a step would have 4 examples instead of 8" in other["error"]
    accumulated = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    (went_on,) = attempt(1, run, stream=stream, max_steps=7, callback=GOES_ON, **accumulated)
    assert "error" not in went_on, went_on["error"]
    assert steps_of([went_on]) == {step: whole[step] for step in range(4, 7)}
    assert went_on["steps"] == 7
    assert any("saved by 2 processes, resumed by 1" in line for line in went_on["said"])


def test_one_process_goes_on_as_two_with_random_numbers_of_their_own(tmp_path: Path) -> None:
    (alone,) = attempt(1, tmp_path / "alone", per_device_train_batch_size=8, max_steps=7)
    run = tmp_path / "run"
    attempt(1, run, per_device_train_batch_size=8, step=4, max_steps=7)
    ranks = attempt(2, run, per_device_train_batch_size=4, max_steps=7, callback=GOES_ON)
    whole = steps_of([alone])
    assert steps_of(ranks) == {step: whole[step] for step in range(4, 7)}
    assert ranks[0]["draw"] != ranks[1]["draw"]
