"""A loop of one's own is held against itself through a probe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.testing import NotExact, Probe, assert_loop_resumes_exactly
from tests.trainer.runs import Net, Rows


def loop(output_dir: str, probe: Probe, *, steps: int = 6, forgets: bool = False) -> Mapping[str, Any]:
    """A plain loop that saves every 2 steps; one that ``forgets`` does not put the random numbers back."""
    torch.manual_seed(1)
    model, rows = Net(), Rows()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    manager, file, first = TrainingStateManager(), Path(output_dir) / "state.safetensors", 0
    if file.exists():
        before = torch.get_rng_state()
        state = manager.load_state(file)
        model.load_state_dict(state["custom_state"]["model"])
        optimizer.load_state_dict(state["custom_state"]["optimizer"])
        first = state["step"]
        if forgets:
            torch.set_rng_state(before)
    for step in range(first + 1, steps + 1):
        batch = {"x": rows.x[step : step + 4], "labels": rows.labels[step : step + 4]}
        loss = model(**batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 2 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            manager.save_state(file, epoch=0, step=step, custom_state=state)
        probe.step(step, batch=batch, loss=loss, model=model)
    return {"weights": model, "optimizer": optimizer, "steps": steps}


def test_exact_loop_is_reported_and_a_forgetful_one_is_caught() -> None:
    report = assert_loop_resumes_exactly(loop, break_at=[3, (2, 5)])
    assert [(run.broken_at, run.resumed_at) for run in report.resumed] == [((3,), (2,)), ((2, 5), (2, 4))]
    assert (report.steps, report.compared["batches"], report.compared["weights"]) == (6, 6, 4)
    with pytest.raises(NotExact) as caught:
        assert_loop_resumes_exactly(lambda at, probe: loop(at, probe, forgets=True), break_at=[3])
    assert (caught.value.kind, caught.value.since) == ("loss", 3)


def silent(output_dir: str, probe: Probe) -> Mapping[str, Any]:
    return {}


def skipping(output_dir: str, probe: Probe) -> Mapping[str, Any]:
    probe.step(1)
    probe.step(3)
    return {}


def anew(output_dir: str, probe: Probe) -> Mapping[str, Any]:
    for step in range(1, 5):
        probe.step(step)
    return {}


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (silent, "never called probe.step"),
        (skipping, "was called after step 1: call it once for every step"),
        (anew, "started again at step 1"),
        (lambda at, probe: loop(at, probe, steps=2), "the run has only 2 steps"),
    ],
)
def test_loops_that_prove_nothing_are_refused(run: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        assert_loop_resumes_exactly(run, break_at=[3])
