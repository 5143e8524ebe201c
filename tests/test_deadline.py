"""When a time limit ends training: what it may be, and whether another step fits before it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest

from hf_lifecycle.processes.deadline import END_VARIABLE, Deadline, TimeLimit

SLURM = "SLURM_JOB_END_TIME"


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (END_VARIABLE, SLURM, "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def left(limit: TimeLimit) -> float | None:
    deadline = limit.begin()
    return None if deadline is None else deadline.ends_at - time.time()


@pytest.mark.parametrize(
    "value",
    [
        lambda: 3600,
        lambda: 3600.0,
        lambda: np.int64(3600),
        lambda: timedelta(hours=1),
        lambda: datetime.now() + timedelta(hours=1),
        lambda: datetime.now(timezone(timedelta(hours=7))) + timedelta(hours=1),
    ],
)
def test_limit_may_be_seconds_or_a_timedelta_or_a_datetime_with_and_without_a_time_zone(
    value: Callable[[], Any],
) -> None:
    assert left(TimeLimit(value())) == pytest.approx(3600, abs=60)


def test_seconds_count_from_the_begin_of_each_training_and_a_datetime_does_not_move() -> None:
    for_each, fixed = TimeLimit(10), TimeLimit(datetime.now() + timedelta(seconds=10))
    first, other = for_each.begin(), fixed.begin()
    time.sleep(0.05)
    later, same = for_each.begin(), fixed.begin()
    assert None not in (first, other, later, same)
    assert later.ends_at >= first.ends_at + 0.05
    assert same.ends_at == other.ends_at


def test_auto_is_what_slurm_says_and_our_own_variable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLURM, str(int(time.time()) + 100))
    assert left(TimeLimit("auto")) == pytest.approx(100, abs=5)
    monkeypatch.setenv(END_VARIABLE, f"{time.time() + 50:.3f}")
    assert left(TimeLimit("auto")) == pytest.approx(50, abs=5)


def test_auto_without_a_scheduler_is_no_limit_and_the_log_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hf_lifecycle"):
        assert left(TimeLimit("auto")) is None
        assert "so there is no limit" in caplog.text
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        assert left(TimeLimit("auto")) is None
    assert [record.levelname for record in caplog.records] == ["INFO", "WARNING"]
    assert END_VARIABLE in caplog.records[-1].getMessage()


@pytest.mark.parametrize("text", ["soon", "-5", "nan", "inf"])
def test_auto_refuses_a_variable_that_is_no_time(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SLURM, text)
    with pytest.raises(ValueError, match=f"{SLURM}='{text}' is not a time"):
        TimeLimit("auto")


def test_datetime_in_the_past_is_an_error() -> None:
    with pytest.raises(ValueError, match="time_limit must be in the future, got 2020"):
        TimeLimit(datetime(2020, 1, 1))


def test_a_step_with_an_evaluation_and_a_save_has_to_fit_with_a_margin() -> None:
    deadline = Deadline(1000.0, 0.0)
    assert deadline.need(None) == 60 * 1.25 + 5  # nothing is known
    deadline.reached(1, 30.0)  # starts the workers, too: counts while it is the only step
    assert deadline.need(2.0) == (30 + 2) * 1.25 + 5
    deadline.reached(2, 34.0)
    deadline.reached(2, 54.0)  # an evaluation
    deadline.reached(3, 56.0)
    assert deadline.need(2.0) == (4 + 20 + 2) * 1.25 + 5
    for step in range(4, 110):
        deadline.reached(step, 56.0 + step)
    assert deadline.need(2.0) == (1 + 20 + 2) * 1.25 + 5  # the slow step is not recent any more
    assert Deadline(20.0, 0.0).need(None) == 2 * 1.25 + 5  # a short limit leaves less for a save


def test_two_steps_have_to_fit_where_the_ranks_learn_of_it_one_step_later() -> None:
    deadline = Deadline(1000.0, 0.0, lag=1)
    deadline.reached(1, 10.0)
    deadline.reached(2, 13.0)
    assert deadline.need(0.0) == 6 * 1.25 + 5
