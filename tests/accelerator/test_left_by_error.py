"""A loop that an error leaves, in a program that catches it: what a save keeps, and where the next run continues."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.accelerator.tiny import Script, new_script

_SAYS = "an error left the loop"


class _Stop(Exception):
    """What the program catches."""


def _raise() -> None:
    raise _Stop


def _same(batches: Any) -> Any:
    return batches


def _through_a_generator(batches: Any) -> Iterator[Any]:
    yield from batches


def _mapped(batches: Any) -> Iterator[Any]:
    return (batch for batch in batches)


def _loops(script: Script, seen: list[int], stop_at: int, *, before: bool, wrap: Callable[[Any], Any] = _same) -> None:
    for _ in script.manager.epochs(2):
        for batch in wrap(script.manager.batches(script.loader)):
            seen.append(int(batch["x"].sum() * 1e4))
            if before and len(seen) == stop_at:
                raise _Stop
            script.train(batch)
            if len(seen) == stop_at:
                _raise()


def _save_finally(script: Script, seen: list[int], *, before: bool, wrap: Callable[[Any], Any]) -> None:
    try:
        for _ in script.manager.epochs(2):
            for batch in wrap(script.manager.batches(script.loader)):
                seen.append(int(batch["x"].sum() * 1e4))
                if not before:
                    script.train(batch)
                if len(seen) == 4:
                    _raise()
                if before:
                    script.train(batch)
    finally:
        script.manager.save()


@pytest.fixture(scope="module")
def unbroken() -> tuple[list[int], dict[str, str]]:
    script, seen = new_script(None, generators=1), []
    _loops(script, seen, 0, before=False)
    return seen, script.digests()


@pytest.mark.parametrize("place", ["in the handler", "after it", "after a break in it", "finally"])
@pytest.mark.parametrize("before", [True, False], ids=["before the step", "after the step"])
@pytest.mark.parametrize("wrap", [_same, _through_a_generator, _mapped])
def test_save_keeps_the_place_and_the_next_run_continues_there_and_both_are_told(
    tmp_path: Path,
    unbroken: tuple[list[int], dict[str, str]],
    caplog: pytest.LogCaptureFixture,
    place: str,
    before: bool,
    wrap: Callable[[Any], Any],
) -> None:
    script, seen = new_script(tmp_path, generators=1), []
    if place == "after a break in it":
        for _ in script.manager.epochs(2):
            try:
                for batch in wrap(script.manager.batches(script.loader)):
                    seen.append(int(batch["x"].sum() * 1e4))
                    if before and len(seen) == 4:
                        raise _Stop
                    script.train(batch)
                    if len(seen) == 4:
                        raise _Stop
            except _Stop:
                break
        script.manager.save()
    elif place == "finally":
        with contextlib.suppress(_Stop):
            _save_finally(script, seen, before=before, wrap=wrap)
    else:
        try:
            _loops(script, seen, 4, before=before, wrap=wrap)
        except _Stop:
            if place == "in the handler":
                script.manager.save()
        if place == "after it":
            script.manager.save()
    assert caplog.text.count(f"not exact: step {4 - before} is saved after {_SAYS}") == 1
    assert len(seen) == 4
    caplog.clear()

    resumed, rest = new_script(tmp_path, generators=2), []
    resumed.manager.resume()
    assert (resumed.manager.progress.epoch, resumed.manager.progress.batch) == (0, 4)
    _loops(resumed, rest, 0, before=False)
    assert seen + rest == unbroken[0]
    assert (resumed.digests() == unbroken[1]) is not before  # whose batch no step was taken on
    assert caplog.text.count(f"not exact: saved after {_SAYS}") == 1


def test_break_still_ends_the_run_also_within_a_handler(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = new_script(tmp_path, generators=1)
    try:
        raise _Stop
    except _Stop:
        for _ in script.manager.epochs(2):
            for batch in script.manager.batches(script.loader):
                script.train(batch)
                break
            break
        script.manager.save()
    resumed = new_script(tmp_path)
    resumed.manager.resume()
    assert list(resumed.manager.epochs(2)) == []
    assert _SAYS not in caplog.text


def test_error_that_skips_the_rest_of_an_epoch_is_of_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(script: Script) -> Script:
        for _ in script.manager.epochs(3):
            try:
                for number, batch in script.manager.enumerate(script.loader):
                    script.train(batch)
                    if number == 2 and script.manager.progress.epoch == 1:
                        raise _Stop
            except _Stop:
                pass
            script.manager.save()
        return script

    unbroken = train(new_script(tmp_path / "unbroken", generators=1))
    broken = new_script(tmp_path / "broken", generators=1)
    broken.manager.save = _after(broken.manager.save, times=2)  # type: ignore[method-assign]
    with pytest.raises(_Stop):
        train(broken)
    resumed = new_script(tmp_path / "broken", generators=2)
    resumed.manager.resume()
    assert resumed.manager.progress.epoch == 2
    assert train(resumed).digests() == unbroken.digests()
    assert _SAYS not in caplog.text


def _after(save: Callable[[], Any], times: int) -> Callable[[], Any]:
    made: list[int] = []

    def saving() -> Any:
        save()
        made.append(1)
        if len(made) == times:
            raise _Stop

    return saving


def test_save_amid_an_accumulation_that_an_error_left_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = new_script(tmp_path, steps=3)
    try:
        for batch in script.manager.batches(script.loader):
            script.train(batch)
            raise _Stop
    except _Stop:
        script.manager.save()
    assert f"step 0 is saved after {_SAYS}" in caplog.text
    resumed = new_script(tmp_path, steps=3)
    resumed.manager.resume()
    assert resumed.manager.progress.batch == 1


def test_loop_that_an_error_left_continues_where_it_is_begun_again_in_the_same_process(
    unbroken: tuple[list[int], dict[str, str]], caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(None, generators=1)
    for attempt in range(2):
        try:
            for _ in script.manager.epochs(2):
                for number, batch in script.manager.enumerate(script.loader):
                    script.train(batch)
                    if attempt == 0 and number == 1:
                        raise _Stop
        except _Stop:
            pass
    assert script.digests() == unbroken[1]
    assert caplog.text.count(f"not exact: training continues with the next batch after {_SAYS}") == 1


def test_iterator_that_is_closed_or_dropped_by_hand_is_not_left_by_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    script = new_script(tmp_path)
    for drop in (lambda one: one.close(), lambda one: None):
        for _ in range(2):  # as the body of a loop
            batches = script.manager.batches(script.loader)
            script.train(next(batches))
            drop(batches)
            del batches
    script.manager.save()
    assert _SAYS not in caplog.text
