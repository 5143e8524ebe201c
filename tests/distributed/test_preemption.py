"""A signal to one rank ends all of them at the same step, which is saved; votes are known to all one step later."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lifecycle import latest_checkpoint

from .launching import launch, told


@pytest.mark.slow
def test_signal_to_one_rank_ends_all_at_one_step_and_the_run_goes_on_exactly_on_each(tmp_path: Path) -> None:
    code, output = launch("torchrun", 2, "tests.distributed.preemption", tmp_path, FRESH_PROCESSES="1")
    main, other = told(tmp_path, 2)
    assert main == other
    # A signal in a step is known to all one step later; in an evaluation or a save at its end.
    ends = {"step": 4, "step of the other rank": 6, "evaluation": 7, "save": 6, "last step": 11, "loop": 2}
    ends["evaluation with workers"] = 7
    for name, step in ends.items():
        assert main[name] == {"by": "SIGTERM", "ended at": step, "saved": f"checkpoint-{step}", "differs": []}, name
    # Rank 1 names its time limit at step 3.
    limited = {"by": "time limit", "ended at": 4, "saved": "checkpoint-4", "differs": []}
    assert main["time limit"] == limited
    assert code != 0
    # The launcher tells one rank after the other: either may be the first to vote.
    step = Path(str(latest_checkpoint(tmp_path / "killed"))).name.removeprefix("checkpoint-")
    assert step in ("3", "4")
    assert f"SIGTERM: saving step {step}, then ending" in output
    assert "got signal: 15" in output, "the launcher, which has passed it on"
