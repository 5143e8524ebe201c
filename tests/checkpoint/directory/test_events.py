"""The event log: every line whole or passed over, bounded, and never in the way of a training."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.events import LOG_NAME, EventLog, read_events


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("saved", step=4, seconds=0.25, path="checkpoint-4", why=None)
    log.write("stopped", step=6, why="no improvement\nin 3 evaluations: \u2028 \ud83d")
    first, second = read_events(tmp_path)
    assert (first.event, dict(first.facts)) == ("saved", {"step": 4, "seconds": 0.25, "path": "checkpoint-4"})
    assert (second.event, second.facts["why"]) == ("stopped", "no improvement\nin 3 evaluations: \u2028 \ud83d")
    assert timedelta(0) <= second.time - first.time < timedelta(minutes=1)
    assert second.time.utcoffset() == timedelta(0)
    assert (tmp_path / LOG_NAME).read_bytes().count(b"\n") == 2


def test_each_event_is_one_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: (written.append(bytes(data)), real(descriptor, data))[1])
    EventLog(tmp_path).write("started")
    EventLog(tmp_path).write("resumed", step=1)
    assert [json.loads(data)["event"] for data in written] == ["started", "resumed"]


def test_not_a_number_is_a_text_and_long_texts_are_cut(tmp_path: Path) -> None:
    EventLog(tmp_path).write("failed", metric=math.nan, why="x" * 100_000)
    (event,) = read_events(tmp_path)
    assert event.facts["metric"] == "nan"
    assert event.facts["why"] == "x" * 1999 + "…"


def test_no_log_has_no_events(tmp_path: Path) -> None:
    assert read_events(tmp_path) == []
    assert read_events(tmp_path / "none") == []


def test_unknown_events_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="event must be one of"):
        EventLog(tmp_path).write("exploded")


def test_every_cut_of_the_last_line_costs_that_line_alone(tmp_path: Path) -> None:
    log, file = EventLog(tmp_path), tmp_path / LOG_NAME
    log.write("saved", step=1)
    whole = len(file.read_bytes())
    log.write("committed", step=1)
    content = file.read_bytes()
    for end in range(whole, len(content) - 1):
        file.write_bytes(content[:end])
        assert [event.event for event in read_events(tmp_path)] == ["saved"]
        log.write("resumed", step=1)
        assert [event.event for event in read_events(tmp_path)] == ["saved", "resumed"]


def test_the_older_half_is_dropped_when_the_log_is_too_large(tmp_path: Path) -> None:
    log = EventLog(tmp_path, largest=4096)
    for step in range(500):
        log.write("saved", step=step)
        assert (tmp_path / LOG_NAME).stat().st_size <= 4096
    steps = [event.facts["step"] for event in read_events(tmp_path)]
    assert steps == list(range(500 - len(steps), 500))
    assert len(steps) > 10
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOG_NAME]


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'"text"',
        b"{}",
        b'{"event": "saved"}',
        b'{"time": "2024-05-01T00:00:00+00:00"}',
        b'{"time": "yesterday", "event": "saved"}',
        b'{"time": "2024-05-01T00:00:00", "event": "saved"}',
        b'{"time": 3, "event": "saved"}',
        b'{"time": "2024-05-01T00:00:00+00:00", "event": {}}',
        b"[" * 10_000,
        b'{"time": "2024-05-01T00:00:00+00:00", "event": "saved", "step": ' + b"9" * 10_000 + b"}",
        b'{"time": "2024-05-01T00:00:00+00:00", "event": "saved", "why": "' + b"x" * 20_000 + b'"}',
    ],
)
def test_hostile_and_foreign_lines_are_passed_over(tmp_path: Path, line: bytes) -> None:
    log = EventLog(tmp_path)
    log.write("started")
    with open(tmp_path / LOG_NAME, "ab") as file:
        file.write(line + b"\n")
    log.write("saved", step=1)
    assert [event.event for event in read_events(tmp_path)] == ["started", "saved"]


def test_values_that_are_no_plain_values_are_left_out_and_unknown_events_are_read(tmp_path: Path) -> None:
    line = {"time": "2024-05-01T02:00:00+02:00", "event": "newer", "deep": [[[]]], "step": 3, "none": None}
    (tmp_path / LOG_NAME).write_text(json.dumps(line))
    (event,) = read_events(tmp_path)
    assert (event.event, dict(event.facts)) == ("newer", {"step": 3})
    assert event.time == datetime(2024, 5, 1, tzinfo=timezone.utc)


def test_of_a_huge_log_the_end_is_read(tmp_path: Path) -> None:
    with open(tmp_path / LOG_NAME, "wb") as file:
        file.truncate(1 << 40)  # sparse
    EventLog(tmp_path / "..", largest=1)  # makes nothing
    with open(tmp_path / LOG_NAME, "ab") as file:
        file.write(b'\n{"time": "2024-05-01T00:00:00+00:00", "event": "saved"}\n')
    assert [event.event for event in read_events(tmp_path)] == ["saved"]
    EventLog(tmp_path).write("committed")
    assert (tmp_path / LOG_NAME).stat().st_size <= 4 << 20
    assert [event.event for event in read_events(tmp_path)] == ["saved", "committed"]


def test_log_that_cannot_be_written_is_one_warning_and_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for directory in (tmp_path / "missing", tmp_path / "taken", tmp_path / "pipe"):
        caplog.clear()
        if directory.name != "missing":
            directory.mkdir()
        if directory.name == "taken":
            (directory / LOG_NAME).mkdir()
        if directory.name == "pipe":
            os.mkfifo(directory / LOG_NAME)
        log = EventLog(directory)
        log.write("started")
        log.write("saved", step=1)
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert f"{directory / LOG_NAME}: events cannot be written" in caplog.text


def test_pipe_in_place_of_the_log_does_not_block_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / LOG_NAME)
    with pytest.raises(OSError, match="not a regular file"):
        read_events(tmp_path)


def test_full_disk_does_not_stop_a_training_and_costs_one_line(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from hf_lifecycle.checkpoint.directory.events import EventLog\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250, resource.RLIM_INFINITY))\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for step in range(5): log.write('saved', step=step)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "log.write('stopped')\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stderr.count("events cannot be written") == 1
    assert [event.facts.get("step") for event in read_events(tmp_path)] == [0, 1, 2, None]


def test_two_writers_tear_no_line(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from hf_lifecycle.checkpoint.directory.events import EventLog\n"
        "log = EventLog(Path(sys.argv[1]))\n"
        "for step in range(300): log.write('saved', step=step, why=sys.argv[2] * 500)\n"
        "print('torch' in sys.modules)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], stdout=subprocess.PIPE, text=True)
        for name in "ab"
    ]
    assert [writer.communicate()[0] for writer in writers] == ["False\n", "False\n"]
    events = read_events(tmp_path)
    assert len(events) == 600
    for name in "ab":
        assert [e.facts["step"] for e in events if e.facts["why"] == name * 500] == list(range(300))
