"""Work on several cores: as if the caller had done it, and over when the call is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from hf_lifecycle.processes import cores
from hf_lifecycle.processes.cores import on_cores

Advance = Callable[[int], None]


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "_WORTH", 0)
    monkeypatch.setattr(cores, "_cores", lambda: 4)


def test_results_are_in_the_order_of_the_items_and_the_largest_begins_first() -> None:
    begun: list[int] = []

    def work(item: int, advance: Advance) -> int:
        begun.append(item)
        time.sleep(0.01)
        return -item

    assert on_cores(work, range(20), range(20)) == [-item for item in range(20)]
    assert sorted(begun[:4]) == [16, 17, 18, 19]


def test_several_threads_work_and_the_caller_tells_of_progress() -> None:
    meeting, told = threading.Barrier(4), []

    def work(item: int, advance: Advance) -> str:
        meeting.wait(10)
        advance(item)
        return threading.current_thread().name

    def advance(size: int) -> None:
        told.append((size, threading.current_thread()))

    assert len(set(on_cores(work, range(4), [1] * 4, advance))) == 4
    assert sorted(size for size, _ in told) == [0, 1, 2, 3]
    assert {thread for _, thread in told} == {threading.current_thread()}


def test_what_one_item_raises_is_raised_and_ends_the_work_on_the_others() -> None:
    begun: list[int] = []

    def work(item: int, advance: Advance) -> None:
        begun.append(item)
        if item == 99:
            raise IndexError("of the work")
        while True:
            advance(1)
            time.sleep(0.001)

    with pytest.raises(IndexError, match="of the work"):
        on_cores(work, range(100), range(100))
    assert sorted(begun) == [96, 97, 98, 99]


def test_ctrl_c_ends_work_amid_an_item() -> None:
    def work(item: int, advance: Advance) -> None:
        while True:
            advance(1)
            time.sleep(0.001)

    def interrupted(size: int) -> None:
        raise KeyboardInterrupt

    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        on_cores(work, range(4), [1] * 4, interrupted)
    assert time.monotonic() - before < 5
    assert not [one for one in threading.enumerate() if one.name.startswith("hf_lifecycle-cores")]


def test_the_caller_works_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    found = on_cores(lambda item, _: (item, threading.current_thread()), range(3), [1] * 3)
    assert found == [(item, threading.current_thread()) for item in range(3)]
