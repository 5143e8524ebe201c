"""What is kept, decided without touching anything."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.retention import (
    AnyOf,
    CheckpointInfo,
    KeepBest,
    KeepEveryHours,
    KeepEverySteps,
    KeepLast,
    RetentionPolicy,
    doomed,
)

START = datetime(2024, 5, 1, tzinfo=timezone.utc)
INFOS = [CheckpointInfo(step, Path(f"/run/checkpoint-{step}")) for step in (3, 6, 9, 12)]


def info(step: int, metric: float | None = None, hours: float | None = None) -> CheckpointInfo:
    created = None if hours is None else START + timedelta(hours=hours)
    return CheckpointInfo(step, Path(f"/run/checkpoint-{step}"), metric, created)


def steps(infos: list[CheckpointInfo] | set[CheckpointInfo]) -> list[int]:
    return sorted(info.step for info in infos)


def random_run(seed: int) -> list[CheckpointInfo]:
    """Checkpoints with gaps, equal metrics, NaN, and some without manifest."""
    chance = random.Random(seed)
    infos, step, hours = [], 0, 0.0
    for _ in range(chance.randrange(40)):
        step += chance.randrange(1, 30)
        hours += chance.random()
        metric = chance.choice([None, math.nan, 0.0, -0.0, math.inf, chance.random(), float(chance.randrange(4))])
        infos.append(info(step, metric, chance.choice([None, hours, hours])))
    return infos


def random_policy(chance: random.Random, *, best: bool = True) -> RetentionPolicy:
    kinds: list[Callable[[], RetentionPolicy]] = [
        lambda: KeepLast(chance.randrange(1, 6)),
        lambda: KeepEverySteps(chance.randrange(1, 100)),
        lambda: KeepEveryHours(0.1 + 5 * chance.random()),
    ]
    if best:
        kinds.append(lambda: KeepBest(chance.randrange(1, 6), chance.choice(["min", "max"])))
    policies = [chance.choice(kinds)() for _ in range(chance.randrange(1, 4))]
    return policies[0] if len(policies) == 1 else AnyOf(tuple(policies))


def test_the_last_are_kept_and_the_rest_goes_oldest_first() -> None:
    assert [info.step for info in doomed(INFOS, KeepLast(2))] == [3, 6]
    assert [info.step for info in doomed(list(reversed(INFOS)), KeepLast(1))] == [3, 6, 9]
    assert doomed(INFOS, KeepLast(4)) == []


def test_what_is_protected_and_the_newest_never_go() -> None:
    assert steps(doomed(INFOS, KeepLast(1), [Path("/run/checkpoint-3")])) == [6, 9]
    assert doomed(INFOS[:1], KeepLast(1)) == []
    assert doomed([], KeepLast(1)) == []


def test_the_best_are_kept_and_nan_or_nothing_is_never_best() -> None:
    infos = [info(1, 0.5), info(2, math.nan), info(3, 0.0), info(4), info(5, -2.0), info(6, 0.5)]
    assert steps(KeepBest(2, "min").keep(infos)) == [3, 5]
    assert steps(KeepBest(1, "max").keep(infos)) == [1]  # of equal ones the earlier
    assert steps(KeepBest(9, "max").keep(infos)) == [1, 3, 5, 6]
    assert steps(doomed([info(1, math.nan), info(2)], KeepBest(1, "min"))) == [1]


def test_every_so_many_steps_the_first_at_or_after_the_multiple_is_kept() -> None:
    assert steps(KeepEverySteps(100).keep([info(step) for step in range(10, 410, 10)])) == [100, 200, 300, 400]
    assert steps(KeepEverySteps(100).keep([info(step) for step in range(37, 420, 37)])) == [111, 222, 333, 407]


def test_every_so_many_hours_by_the_time_of_the_commit() -> None:
    infos = [info(1, hours=0), info(2, hours=1.9), info(3), info(4, hours=2), info(5, hours=3), info(6, hours=7)]
    assert steps(KeepEveryHours(2).keep(infos)) == [1, 4, 6]


def test_clock_set_back_does_not_stop_the_keeping() -> None:
    infos = [info(1, hours=100), info(2, hours=1), info(3, hours=1.5), info(4, hours=3)]
    assert steps(KeepEveryHours(2).keep(infos)) == [1, 2, 4]


def test_combined_policies_keep_what_any_keeps() -> None:
    policy = KeepLast(1) | KeepBest(1, "min") | KeepEverySteps(10)
    assert policy == AnyOf((KeepLast(1), KeepBest(1, "min"), KeepEverySteps(10)))
    assert steps(policy.keep([info(step, metric=abs(step - 7)) for step in range(1, 14)])) == [7, 10, 13]
    assert (KeepLast(1) | policy).policies == (KeepLast(1), *policy.policies)


@pytest.mark.parametrize("seed", range(50))
def test_nothing_but_the_unkept_is_doomed_and_doing_it_twice_dooms_no_more(seed: int) -> None:
    chance = random.Random(1000 + seed)
    infos, policy = random_run(seed), random_policy(chance)
    protected = [info.path for info in infos if chance.random() < 0.1]
    shuffled = chance.sample(infos, len(infos))
    gone = doomed(shuffled, policy, protected)
    assert gone == sorted(gone, key=lambda info: info.step)
    assert not {info.path for info in gone} & {*protected, *(info.path for info in infos[-1:])}
    assert not set(gone) & policy.keep(infos)
    left = [info for info in infos if info not in gone]
    assert len(left) + len(gone) == len(infos)
    unprotected = {info for info in left if info.path not in protected}
    assert unprotected <= policy.keep(infos) | set(infos[-1:])
    assert doomed(left, policy, [info.path for info in left if info.path in protected]) == []


@pytest.mark.parametrize("seed", range(50))
def test_applied_after_each_commit_it_keeps_what_it_keeps_applied_once(seed: int) -> None:
    infos, policy = random_run(seed), random_policy(random.Random(seed), best=False)
    left: list[CheckpointInfo] = []
    for new in infos:
        left.append(new)
        gone = doomed(left, policy)
        left = [info for info in left if info not in gone]
    at_once = doomed(infos, policy)
    assert left == [info for info in infos if info not in at_once]


@pytest.mark.parametrize("seed", range(20))
def test_the_best_of_the_whole_run_is_there_in_the_end(seed: int) -> None:
    infos = random_run(seed)
    left: list[CheckpointInfo] = []
    for new in infos:
        left.append(new)
        gone = doomed(left, KeepBest(1, "max"))
        left = [info for info in left if info not in gone]
    assert KeepBest(1, "max").keep(infos) <= set(left)


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: KeepLast(0), ValueError, "count"),
        (lambda: KeepLast(True), TypeError, "count"),
        (lambda: KeepBest(-1, "min"), ValueError, "count"),
        (lambda: KeepBest(1, "lowest"), ValueError, "mode"),  # type: ignore[arg-type]
        (lambda: KeepEverySteps(2.5), TypeError, "steps"),  # type: ignore[arg-type]
        (lambda: KeepEveryHours(0), ValueError, "hours"),
        (lambda: KeepEveryHours(math.nan), ValueError, "hours"),
        (lambda: KeepEveryHours("2"), TypeError, "hours"),  # type: ignore[arg-type]
        (lambda: AnyOf(()), ValueError, "policies"),
        (lambda: AnyOf((3,)), TypeError, "policies"),  # type: ignore[arg-type]
        (lambda: KeepLast(1) | 3, TypeError, "unsupported operand"),  # type: ignore[operator]
    ],
)
def test_senseless_policies_are_refused(make: Callable[[], object], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        make()
