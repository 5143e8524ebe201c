"""The event log as attempts: where each began, what it saved, how long training waited, and how it ended."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from hf_lifecycle.checkpoint.directory.events import Event
from hf_lifecycle.checkpoint.inspection.attempts import attempts_of

BEGAN = datetime(2026, 1, 1, tzinfo=timezone.utc)


def told(*lines: tuple[str, dict[str, Any]]) -> list[Event]:
    return [Event(BEGAN + timedelta(seconds=index), event, facts) for index, (event, facts) in enumerate(lines)]


def save(step: int) -> list[tuple[str, dict[str, Any]]]:
    return [("saved", {"step": step, "seconds": 0.25}), ("committed", {"step": step, "seconds": 0.5, "bytes": 64})]


def test_a_killed_and_resumed_run_is_two_attempts() -> None:
    first, second = attempts_of(
        told(
            ("started", {"step": 0}),
            *save(10),
            *save(20),
            ("recovered", {"why": "a folder was cleared"}),
            ("resumed", {"step": 20, "path": "checkpoint-20"}),
            *save(30),
            ("removed", {"step": 10}),
            ("stopped", {"step": 35, "why": "enough"}),
            ("ended", {"step": 35}),
        )
    )
    assert (first.first_step, first.last_step, first.ending, first.resumed_from) == (0, 20, None, None)
    assert [(save.step, save.committed, save.removed) for save in first.saves] == [(10, True, True), (20, True, False)]
    assert (second.first_step, second.last_step, second.ending, second.why) == (20, 35, "stopped", "enough")
    assert (second.resumed_from, second.began) == ("checkpoint-20", BEGAN + timedelta(seconds=6))


def test_what_saved_and_committed_took_is_what_training_waited() -> None:
    (attempt,) = attempts_of(told(("started", {"step": 0}), *save(10)))
    assert [(save.stall, save.size) for save in attempt.saves] == [(0.75, 64)]


def test_of_a_save_in_the_background_only_the_stall_counts() -> None:
    background = [("asked", {"step": 10}), ("snapshot", {"step": 10, "stall": 0.002}), ("written", {"step": 10})]
    (attempt,) = attempts_of(told(("started", {"step": 0}), *background, ("committed", {"step": 10, "seconds": 2.0})))
    assert [(save.stall, save.committed) for save in attempt.saves] == [(0.002, True)]
    (attempt,) = attempts_of(told(("started", {"step": 0}), ("asked", {"step": 10}), *save(10)))
    assert attempt.saves[0].stall is None, "the log does not tell"


def test_a_preempted_attempt_and_one_that_finished_in_spite_of_a_signal() -> None:
    preempted = ("preempted", {"step": 12, "why": "SIGTERM"})
    (attempt,) = attempts_of(told(("started", {"step": 0}), preempted, *save(12)))
    assert (attempt.ending, attempt.why, attempt.last_step) == ("preempted", "SIGTERM", 12)
    (attempt,) = attempts_of(told(("started", {"step": 0}), preempted, ("ended", {"step": 12})))
    assert attempt.ending == "ended"


def test_a_failed_save_that_was_followed_by_another_ended_nothing() -> None:
    failed = ("failed", {"step": 10, "why": "OSError: full"})
    (attempt,) = attempts_of(told(("started", {"step": 0}), failed))
    assert (attempt.ending, attempt.why) == ("failed", "OSError: full")
    (attempt,) = attempts_of(told(("started", {"step": 0}), failed, *save(20)))
    assert attempt.ending is None


def test_a_log_whose_beginning_is_lost_begins_at_its_first_save() -> None:
    (attempt,) = attempts_of(told(*save(40), *save(50)))
    assert (attempt.first_step, attempt.begins_at, attempt.last_step) == (None, 40, 50)


@pytest.mark.parametrize("step", [None, -1, 1.5, True, "7", 10**400, float("inf")])
def test_events_without_a_step_or_of_unknown_kinds_are_passed_over(step: Any) -> None:
    facts = {} if step is None else {"step": step}
    events = told(("started", facts), ("committed", facts), ("teleported", {"step": 3}), ("skipped", {"step": 9}))
    assert attempts_of(events) == []


def test_facts_that_are_no_numbers_are_not_told() -> None:
    facts = {"step": 5, "bytes": "many", "seconds": float("inf"), "stall": 10**400}
    (attempt,) = attempts_of(told(("committed", facts)))
    assert [(save.stall, save.size, save.committed) for save in attempt.saves] == [(None, None, True)]
