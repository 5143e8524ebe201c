"""A consensus of real processes: the same answer at the same call on all, one step later; an end where one is gone."""

from __future__ import annotations

import pytest
from test_ranks import run_ranks

from hf_lifecycle.processes.signal_consensus import SignalConsensus


def test_one_process_has_its_answer_at_once() -> None:
    assert [SignalConsensus("x").cast(number) for number in (0, 15)] == [0, 15]


@pytest.mark.slow
def test_all_ranks_have_the_largest_number_one_call_later_and_do_not_wait_for_ever_for_one_that_is_gone() -> None:
    told = run_ranks(
        """
from hf_lifecycle.processes.signal_consensus import SignalConsensus
votes = SignalConsensus("the end", timeout=3)
named = {0: [0, 0, 2, 0, 0], 1: [0, 15, 0, 0, 0], 2: [0, 0, 0, 0, 9]}[ranks.rank]
told["answers"] = []
for number in named[:-1]:
    time.sleep(0.05 * ranks.rank)  # they are not at one step at once
    told["answers"].append(votes.cast(number))
told["waited for"] = votes.cast(named[-1], wait=True)
told["interrupted"] = None
patient = SignalConsensus("a vote", timeout=60)
if ranks.rank == 2:  # before the next vote, to which the others have come
    with contextlib.suppress(KeyboardInterrupt), ranks.agree(what="a save"):
        raise KeyboardInterrupt
else:
    told["interrupted"] = caught(lambda: patient.cast(0, wait=True))
if ranks.rank != 2:
    told["gone"] = caught(lambda: votes.cast(0, wait=True))
else:
    time.sleep(6)
ranks.barrier(what="the end of the test")
"""
    )
    for rank in told:
        assert rank is not None
        assert rank["answers"] == [0, 0, 15, 2]
        assert rank["waited for"] == 9
    for rank in told[:2]:
        assert rank is not None
        kind, text, seconds = rank["interrupted"]  # type: ignore[misc]
        assert kind == "RankFailed"
        assert text.endswith("a save: failed on other ranks:\n  - rank 2: KeyboardInterrupt")
        assert seconds < 30
        kind, text, seconds = rank["gone"]  # type: ignore[misc]
        assert kind == "RankUnreachable"
        assert "the end" in text
        assert seconds < 20
