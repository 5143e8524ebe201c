"""The background thread: it copies the newest, says what fails, and never stands in the way."""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.checkpoint.directory.manifest import Manifest
from hf_lifecycle.checkpoint.directory.retention import KeepBest, KeepLast
from hf_lifecycle.mirror.places import Check, Copy, FolderPlace, Place
from hf_lifecycle.mirror.settings import Mirror
from hf_lifecycle.mirror.worker import MirrorWorker
from tests.mirror.runs import Told, files_of, fresh_url, make, steps_at


class Slow(FolderPlace):
    """A folder whose uploads wait to be let through, and then fail as often as they are told to."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.gate, self.began = threading.Event(), threading.Event()
        self.failures: list[Exception] = []
        self.tries = 0

    def put(self, source: Path, manifest: Manifest, owner: str, check: Check) -> Copy:
        self.tries += 1
        self.began.set()
        assert self.gate.wait(20)
        if self.failures:
            raise self.failures.pop(0)
        return super().put(source, manifest, owner, check)


@dataclass(frozen=True)
class MirrorAt(Mirror):
    """A mirror whose place is given."""

    place: Place | None = None

    def open(self) -> Place:
        assert self.place is not None
        return self.place


@pytest.fixture
def slow(tmp_path: Path) -> Slow:
    return Slow(tmp_path / "drive")


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def worker(place: Slow, out: Path, told: Told, *, wait: float = 20, **settings: Any) -> MirrorWorker:
    out.mkdir(exist_ok=True)
    mirror = MirrorAt(str(out.parent / "drive"), place=place, wait_seconds=wait)
    return MirrorWorker(mirror, out, told, pauses=(0.01, 0.02), **settings)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_each_checkpoint_is_copied_and_old_copies_go_by_the_policy(
    kind: str, tmp_path: Path, out: Path, told: Told
) -> None:
    out.mkdir()
    mirror = Mirror(fresh_url(kind, tmp_path))
    carrier = MirrorWorker(mirror, out, told, keep=KeepLast(1) | KeepBest(1, "min"))
    for number, metric in enumerate([0.5, 0.2, 0.4], start=1):
        carrier.offer(make(out, 4 * number, metric=metric))
        deadline = time.monotonic() + 10
        while told.count(("mirrored", 4 * number)) == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
    carrier.close()
    assert steps_at(mirror) == [12, 8]
    assert [each for each in told if each[0] != "mirrored"] == [("mirror_removed", 4)]
    assert [each for each in told if each[0] == "mirrored"] == [("mirrored", 4), ("mirrored", 8), ("mirrored", 12)]
    assert [len(store.checkpoints_in(out)), list((store.hidden_folder(out) / "mirroring").iterdir())] == [3, []]


def test_slow_mirror_gets_the_newest_and_what_was_passed_over_is_told(
    slow: Slow, out: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    carrier = worker(slow, out, told)
    for step in (4, 8, 12, 16):
        began = time.monotonic()
        carrier.offer(make(out, step))
        assert time.monotonic() - began < 5
        assert slow.began.wait(10)
    slow.gate.set()
    carrier.close()
    assert told == [("skipped", 8), ("skipped", 12), ("mirrored", 4), ("mirrored", 16)]
    assert len(warnings_in(caplog)) == 1


def test_best_that_was_passed_over_is_copied_before_the_copy_of_the_one_before_is_removed(
    slow: Slow, out: Path, told: Told
) -> None:
    carrier = worker(slow, out, told, keep=KeepLast(1))
    best = make(out, 4)
    carrier.offer(best, [best])
    assert slow.began.wait(10)
    best = make(out, 8)
    carrier.offer(best, [best])
    carrier.offer(make(out, 12), [best])
    assert told == [("skipped", 8)]
    slow.gate.set()
    carrier.close()
    assert told[1:] == [("mirrored", 4), ("mirrored", 12), ("mirrored", 8), ("mirror_removed", 4)]
    assert steps_at(Mirror(str(out.parent / "drive"))) == [12, 8]


class RefusesOne(Slow):
    """A folder that takes every checkpoint but that of step 8."""

    def put(self, source: Path, manifest: Manifest, owner: str, check: Check) -> Copy:
        if manifest.step == 8:
            raise OSError("refused")
        return super().put(source, manifest, owner, check)


def test_best_that_cannot_be_copied_costs_no_copy_of_the_one_before(
    out: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    place = RefusesOne(out.parent / "drive")
    place.gate.set()
    carrier = worker(place, out, told, keep=KeepLast(1))
    best = make(out, 4)
    carrier.offer(best, [best])
    while not told:
        time.sleep(0.005)
    best = make(out, 8)
    carrier.offer(make(out, 12), [best])
    carrier.close()
    assert steps_at(Mirror(str(out.parent / "drive"))) == [12, 4]
    assert told == [("mirrored", 4), ("mirrored", 12), ("mirror_failed", 12)]
    assert [line for line in warnings_in(caplog) if "checkpoint-12 is copied, but" in line and "refused" in line]
    assert not list((store.hidden_folder(out) / "mirroring").iterdir())


def test_best_that_is_nowhere_any_more_holds_nothing_up(out: Path, told: Told, slow: Slow) -> None:
    slow.gate.set()
    carrier = worker(slow, out, told, keep=KeepLast(1))
    for step in (4, 8):
        carrier.offer(make(out, step), [out / "checkpoint-2", out.parent / "elsewhere" / "checkpoint-3"])
        while told.count(("mirrored", step)) == 0:
            time.sleep(0.005)
    carrier.close()
    assert told == [("mirrored", 4), ("mirrored", 8), ("mirror_removed", 4)]


def test_checkpoint_that_retention_removes_meanwhile_is_copied_all_the_same(slow: Slow, out: Path, told: Told) -> None:
    carrier = worker(slow, out, told)
    checkpoint = make(out, 4)
    expected = files_of(checkpoint)
    carrier.offer(checkpoint)
    store.remove(checkpoint)
    slow.gate.set()
    carrier.close()
    assert told == [("mirrored", 4)]
    assert files_of(out.parent / "drive" / "checkpoint-4") == expected


def test_without_hard_links_it_is_passed_over_and_told(
    slow: Slow, out: Path, told: Told, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def link(*_: Any, **__: Any) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", link)
    carrier = worker(slow, out, told)
    carrier.offer(make(out, 4))
    store.remove(out / "checkpoint-4")
    slow.gate.set()
    carrier.close()
    assert told[0] == ("skipped", 4)
    assert "removed before its copy was done" in caplog.text
    carrier = worker(slow, out, told)
    carrier.offer(make(out, 8))
    carrier.close()
    assert told[-1] == ("mirrored", 8)


def test_failures_are_tried_again_warned_of_once_a_kind_and_never_raised(
    slow: Slow, out: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    slow.gate.set()
    slow.failures = [OSError("reset"), OSError("reset again"), OSError("a third time"), OSError("later")]
    carrier = worker(slow, out, told)
    carrier.offer(make(out, 4))
    deadline = time.monotonic() + 10
    while ("skipped", 4) not in told and time.monotonic() < deadline:
        time.sleep(0.005)
    carrier.offer(make(out, 8))
    carrier.close()
    assert told == [("mirror_failed", 4)] * 3 + [("skipped", 4), ("mirror_failed", 8), ("mirrored", 8)]
    assert [line for line in warnings_in(caplog) if "reset" in line and "training continues" in line]
    assert len(warnings_in(caplog)) == 2
    assert "OSError: reset" in told.facts[0]["why"]


def test_client_may_raise_what_it_likes(slow: Slow, out: Path, told: Told) -> None:
    slow.gate.set()
    slow.failures = [RuntimeError("Session is closed"), TypeError("of its own making"), ZeroDivisionError()]
    carrier = worker(slow, out, told)
    carrier.offer(make(out, 4))
    carrier.close()
    assert told[-1] == ("skipped", 4)
    assert [each for each in told if each[0] == "mirror_failed"] == [("mirror_failed", 4)] * 3


def test_end_waits_for_the_last_copy_so_long_and_then_names_what_is_missing(
    slow: Slow, out: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    carrier = worker(slow, out, told, wait=0.2)
    carrier.offer(make(out, 4))
    assert slow.began.wait(10)
    began = time.monotonic()
    carrier.close()
    assert 0.2 <= time.monotonic() - began < 5
    assert "checkpoint-4 is NOT at" in caplog.text
    assert told[-1] == ("skipped", 4)
    slow.gate.set()
    time.sleep(0.1)  # the thread ends at its next check
    assert steps_at(Mirror(str(out.parent / "drive"))) == []
    carrier.close()  # a second time does nothing
    carrier.offer(make(out, 8))
    assert told[-1] == ("skipped", 8)
    assert not list((store.hidden_folder(out) / "mirroring").iterdir())


def test_pause_before_a_new_try_does_not_outlast_the_end(slow: Slow, out: Path, told: Told) -> None:
    slow.gate.set()
    slow.failures = [OSError("reset")] * 9
    carrier = worker(slow, out, told, wait=0.3)
    carrier._pauses = (60.0,)
    carrier.offer(make(out, 4))
    began = time.monotonic()
    carrier.close()
    assert time.monotonic() - began < 5
    assert told[-1] == ("skipped", 4)


def test_mirror_of_another_run_is_left_alone(tmp_path: Path, told: Told, caplog: pytest.LogCaptureFixture) -> None:
    mirror = Mirror(str(tmp_path / "drive"))
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        carrier = MirrorWorker(mirror, tmp_path / run, told, keep=KeepLast(1))
        carrier.offer(make(tmp_path / run, 4 if run == "one" else 8))
        carrier.close()
    assert steps_at(mirror) == [4]
    assert told[:2] == [("mirrored", 4), ("mirror_failed", 8)]
    assert "of another run" in caplog.text


def test_drive_that_is_unmounted_between_is_noticed_though_its_mount_point_is_there(
    out: Path, tmp_path: Path, told: Told
) -> None:
    out.mkdir()
    carrier = MirrorWorker(Mirror(str(tmp_path / "drive")), out, told, pauses=(0.01,))
    carrier.offer(make(out, 4))
    while not told:
        time.sleep(0.005)
    (tmp_path / "drive").rename(tmp_path / "unmounted")
    (tmp_path / "drive").mkdir()
    carrier.offer(make(out, 8))
    carrier.close()
    assert told[-1] == ("skipped", 8)
    assert "still mounted" in told.facts[1]["why"]
    assert list((tmp_path / "drive").iterdir()) == []


def test_same_checkpoint_again_is_not_copied_again(out: Path, tmp_path: Path, told: Told) -> None:
    out.mkdir()
    make(out, 4)
    for _ in range(2):
        carrier = MirrorWorker(Mirror(str(tmp_path / "drive")), out, told)
        carrier.offer(out / "checkpoint-4")
        carrier.close()
    assert told == [("mirrored", 4)]


def test_what_cannot_be_offered_is_told_and_not_raised(
    slow: Slow, out: Path, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    carrier = worker(slow, out, told)
    carrier.offer(out / "checkpoint-4")
    assert "checkpoint-4 is not copied" in caplog.text
    carrier.close()


@contextmanager
def unavailable() -> Iterator[tuple[int, list[str]]]:
    """A server that answers every request with 503."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port, asked
        finally:
            server.shutdown()
            thread.join()


def test_retries_of_the_store_s_client_leave_training_s_random_numbers_alone(out: Path, told: Told) -> None:
    out.mkdir()
    with unavailable() as (port, asked):
        options = {
            "key": "k",
            "secret": "s",
            "endpoint_url": f"http://127.0.0.1:{port}",
            "config_kwargs": {"retries": {"max_attempts": 2, "mode": "legacy"}},
        }
        before = random.getstate()
        carrier = MirrorWorker(Mirror("s3://bucket/run", options), out, told, pauses=())
        carrier.offer(make(out, 4))
        deadline = time.monotonic() + 20
        while len(asked) < 2:  # its pause before the second was drawn
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert random.getstate() == before
        carrier.close(0)
