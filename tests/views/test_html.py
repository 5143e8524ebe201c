"""Runs, checkpoints, callbacks and replays show themselves in a notebook: true, safe, small, and with nothing fetched.

Set ``HF_LIFECYCLE_PAGES`` to a folder to get the pages as files, to be looked at in a browser.
"""

from __future__ import annotations

import inspect
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import fields, replace
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from hf_lifecycle import Checkpoint, EarlyStopping, KeepLast, LifecycleCallback, Run
from hf_lifecycle.checkpoint.directory.events import LOG_NAME, Event, EventLog
from hf_lifecycle.checkpoint.directory.manifest import manifest_path, read_manifest
from hf_lifecycle.checkpoint.inspection import description as inspection
from hf_lifecycle.hosts.trainer.options import Options
from hf_lifecycle.views.html import run_page

NASTY = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&amp;", "\x1b[2J\x00", "x\udc80", "a\u202eb"]


class Tags(HTMLParser):
    """The names of all tags and attributes of a page, and that each tag is closed."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._open.append(tag)
        self.handle_startendtag(tag, attributes)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text += data + "\n"


def read(page: str) -> Tags:
    """The page's tags, having looked that it is safe, well formed, and fetches nothing."""
    found = Tags(page)
    ElementTree.fromstring(page)  # every tag closed, every attribute quoted: no parser guesses
    words = "div style p span time table thead tbody tr th td details summary pre svg g path circle rect text title"
    assert found.tags <= set(words.split())
    assert not {name for name in found.attributes if name.startswith("on") or name in ("href", "src", "id")}
    assert "url(" not in page
    assert "http" not in page
    page.encode()  # a notebook is a file in UTF-8
    return found


def test_a_run_shows_attempts_checkpoints_and_the_stop(finished: Any) -> None:
    directory, _ = finished
    text = read(Run(directory)._repr_html_()).text
    assert "2 checkpoints; newest intact: checkpoint-" in text
    assert "resumed 1 time; early stopping at step" in text
    for words in ("started", "from 4", "interrupted after 4", "eval_loss", "within min_delta 0.5", "patience 2 eval"):
        assert words in text
    assert "intact: newest" in text
    assert "What happened" in text


def test_the_callback_shows_its_run_with_the_evaluations_after_the_last_save(finished: Any) -> None:
    directory, callback = finished
    assert repr(callback) == "LifecycleCallback(patience=2, min_delta=0.5)"
    page = callback._repr_html_()
    stop = Run(directory).attempts[-1].last_step
    assert f"stop at {stop}" in read(page).text
    assert repr(callback) in read(page).text
    assert "in no training yet" in LifecycleCallback()._repr_html_()


def test_the_callbacks_plain_form_knows_every_argument() -> None:
    assert repr(LifecycleCallback()) == "LifecycleCallback()"
    assert [field.name for field in fields(Options)] == list(inspect.signature(LifecycleCallback).parameters)
    given = LifecycleCallback(strict=False, signals=(), keep=KeepLast(2))
    assert repr(given) == "LifecycleCallback(keep=KeepLast(count=2), strict=False, signals=())"


def test_a_loop_without_a_log_shows_what_its_checkpoints_were_judged_by(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write("started", step=0)
    for step, metric in ((10, 0.5), (20, None), (30, 0.25)):
        log.write("committed", step=step, metric=metric, seconds=0.1)
    page = Run(tmp_path)._repr_html_()
    assert "step 30: 0.25" in read(page).text
    assert "step 20" not in read(page).text.partition("What happened")[0]


def test_a_checkpoint_shows_what_is_in_it(finished: Any) -> None:
    checkpoint = Run(finished[0]).newest
    assert checkpoint is not None
    text = read(checkpoint._repr_html_()).text
    for words in (
        "intact",
        "4 tensors, 49 elements (4 F32)",
        "numpy, python, torch",
        "model.safetensors",
        "patience 2",
    ):
        assert words in text


def test_a_replay_shows_when_it_would_have_stopped(finished: Any) -> None:
    replay = Run(finished[0]).replay(patience=1, min_delta=5.0)
    assert f"would have stopped at step {replay.stopped_at}" in read(replay._repr_html_()).text


def test_the_plain_forms_are_of_use_in_a_terminal(finished: Any) -> None:
    run = Run(finished[0])
    assert repr(run).startswith(f"Run({str(finished[0])!r}): 2 checkpoints; newest intact: checkpoint-")
    assert "What happened last" in str(run)
    assert run.newest is not None
    assert "intact" in repr(run.newest)
    assert "4 tensors" in str(run.newest)
    assert run.newest.log_history == run.log_history != []
    assert run.report()["newest"] == run.newest.path.name


def test_what_is_no_run_and_what_is_no_checkpoint_is_told_from_each_other(finished: Any, tmp_path: Path) -> None:
    directory, _ = finished
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is one checkpoint"):
        Run(Run(directory).checkpoints[0].path)
    with pytest.raises(ValueError, match="directory of checkpoints; use Run"):
        Checkpoint(directory)
    with pytest.raises(ValueError, match="is no checkpoint"):
        Checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Run(tmp_path / "none")
    with pytest.raises(NotADirectoryError):
        Run(tmp_path / "file")
    assert "no checkpoints" in read(Run(tmp_path)._repr_html_()).text


def test_damage_is_shown_and_never_raised(finished: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    newest, older = Run(run).checkpoints
    (newest.path / "optimizer.pt").unlink()
    (older.path / "trainer_state.json").write_text('{"log_history": [1, {"eval_loss": "x", "step": []}]}')
    (run / LOG_NAME).write_text('{"time": "2026-01-01T00:00:00+00:00", "event": "started", "step": 0, "monitor": 3}\n')
    text = read(Run(run)._repr_html_()).text
    assert "✕" in text
    assert "optimizer.pt" in text
    for checkpoint, state in ((newest, "damaged"), (older, "edited")):
        assert state in read(checkpoint._repr_html_()).text
        assert "damaged" in repr(checkpoint)
    (run / LOG_NAME).unlink()
    (run / LOG_NAME).mkdir()
    assert "damaged" in read(Run(run)._repr_html_()).text


def test_a_run_that_is_looked_at_while_it_removes_a_checkpoint_is_shown_without_it(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    older = Run(run).checkpoints[-1].path
    looked_at = inspection.problems_of

    def removed_meanwhile(checkpoint: Path, **how: Any) -> list[str]:
        shutil.rmtree(older, ignore_errors=True)
        return [] if checkpoint == older else looked_at(checkpoint, **how)

    monkeypatch.setattr(inspection, "problems_of", removed_meanwhile)
    text = read(Run(run)._repr_html_()).text
    assert "1 checkpoint;" in text
    assert "damaged" not in text


@pytest.mark.parametrize("nasty", NASTY)
def test_text_from_files_is_shown_and_never_obeyed(finished: Any, tmp_path: Path, nasty: str) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    for checkpoint in Run(run).checkpoints:
        manifest = read_manifest(checkpoint.path)
        assert manifest.metric is not None
        named = replace(manifest, metric=replace(manifest.metric, name=nasty))
        manifest_path(checkpoint.path).write_bytes(named.to_json())
    facts = {"time": "2026-01-01T00:00:00+00:00", "step": 4, "why": nasty, "monitor": nasty, "path": nasty}
    with open(run / LOG_NAME, "a") as log:
        for event in ("resumed", "preempted", nasty):
            log.write(json.dumps({"event": event, **facts}) + "\n")
    for page in (Run(run)._repr_html_(), Run(run).checkpoints[0]._repr_html_()):
        text = read(page).text
        assert "\x1b" not in page
        assert "\u202e" not in page
        if nasty.isprintable():
            assert nasty in text


def many(checkpoints: int, events: int) -> tuple[dict[str, Any], list[Event]]:
    row = {"size": 1, "created": None, "manifest": True, "whole": True, "problems": [], "epoch": 1.0, "metric": None}
    rows = [{**row, "name": f"checkpoint-{step}", "step": step} for step in range(checkpoints, 0, -1)]
    began = datetime(2026, 1, 1, tzinfo=timezone.utc)
    told = [
        Event(began, "resumed" if index % 50 == 0 else "committed", {"step": index, "seconds": 0.1, "bytes": 5})
        for index in range(events)
    ]
    return {"directory": "run", "newest": None, "checkpoints": rows, "damaged": rows, "left_overs": []}, told


def test_a_run_of_thousands_of_events_is_small_and_fast() -> None:
    report, events = many(500, 20_000)
    losses = [{"eval_loss": math.sin(step), "step": step} for step in range(1, 20_000)]
    replay = EarlyStopping.replay(losses, patience=None)
    began = time.process_time()
    page = run_page(report, events, replay)
    assert time.process_time() - began < 2.0
    assert len(page) < 120_000
    text = read(page).text
    assert "490 older checkpoints" in text
    assert "392 earlier attempts not shown" in text


@pytest.mark.parametrize(
    ("values", "settings"),
    [
        ([0.5], {}),
        ([math.nan] * 3, {"check_finite": False}),
        ([0.5] * 30, {"patience": 3, "min_delta": 0.1}),
        ([math.inf, -math.inf, 0.5], {"check_finite": False}),
        ([1e308, -1e308, 0.0] * 5, {"patience": 40}),
        ([5e-324, 0.0], {"min_delta": 1e308}),
        ([value / 7 for value in range(40, 0, -1)], {"mode": "max", "patience": 100}),
        ([math.exp(-value) for value in range(40)], {"patience": 50, "min_delta": 0.01}),
    ],
)
def test_any_curve_is_drawn(values: list[float], settings: dict[str, Any]) -> None:
    rows = [{"eval_loss": value, "step": 100 * index} for index, value in enumerate(values, 1)]
    page = EarlyStopping.replay(rows, **settings)._repr_html_()
    read(page)
    places = [
        mark.get(name, "") for mark in ElementTree.fromstring(page).iter() for name in ("d", "x", "y", "cx", "cy")
    ]
    assert not [place for place in places if "nan" in place or "inf" in place or "e+" in place]


def test_pages_need_neither_matplotlib_nor_torch(finished: Any) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None; from hf_lifecycle import Run;"
        f"run = Run({str(finished[0])!r}); page = run._repr_html_(); page += run.newest._repr_html_();"
        "assert 'svg' in page; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
