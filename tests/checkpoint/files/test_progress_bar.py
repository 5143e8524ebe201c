"""A bar where one is waited for and can be seen; in a log one line; and nothing where it was switched off."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import redirect_stderr
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hf_lifecycle.checkpoint.directory.admission import latest_checkpoint
from hf_lifecycle.checkpoint.directory.manifest import Manifest
from hf_lifecycle.checkpoint.directory.store import commit, recover, staging_folder
from hf_lifecycle.checkpoint.directory.verification import verify
from hf_lifecycle.checkpoint.files import progress_bar as progress
from hf_lifecycle.checkpoint.files.progress_bar import reading


def _resize(terminal: int) -> None:
    """24 lines of 100 characters; a new one has none at all."""
    import fcntl
    import struct
    import termios

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))


class Screen:
    """A terminal in the place of standard error."""

    def __init__(self) -> None:
        pty = pytest.importorskip("pty")
        self._ours, theirs = pty.openpty()
        _resize(theirs)
        os.set_blocking(self._ours, False)
        self.file = os.fdopen(theirs, "w", buffering=1)

    def text(self) -> str:
        self.file.flush()
        try:
            return os.read(self._ours, 1 << 16).decode()
        except BlockingIOError:
            return ""

    def close(self) -> None:
        self.file.close()
        os.close(self._ours)


@pytest.fixture
def screen() -> Iterator[Screen]:
    made = Screen()
    yield made
    made.close()


def run(directory: Path) -> Path:
    """A checkpoint of 12 MB."""
    staged = staging_folder(directory) / "checkpoint-3"
    staged.mkdir(parents=True)
    (staged / "trainer_state.json").write_text("{}")
    (staged / "model.bin").write_bytes(bytes(12 << 20))
    commit(staged, directory / "checkpoint-3", lambda files: Manifest("", 3, 1.0, 1, "", None, files))
    return directory


def test_bar_appears_only_after_a_second(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    # Not in the fixture: pytest sets sys.stderr anew when the test itself begins.
    with redirect_stderr(screen.file), reading("verifying checkpoint-3", 100) as advance:
        advance(10)
        assert screen.text() == ""
        monkeypatch.setattr(progress, "PATIENCE", 0.0)
        advance(10)
        assert "verifying checkpoint-3:  20%" in screen.text()


@pytest.mark.parametrize("look", [latest_checkpoint, recover])
def test_bar_is_shown_wherever_files_are_verified_and_leaves_no_thread(
    look: Any, screen: Screen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    run(tmp_path)
    threads = threading.active_count()
    with redirect_stderr(screen.file):
        look(tmp_path)
    assert "verifying checkpoint-3" in screen.text()
    assert threading.active_count() == threads
    logger = logging.getLogger("hf_lifecycle")
    before = logger.level
    with redirect_stderr(screen.file):
        verify(tmp_path / "checkpoint-3", progress=False)
        monkeypatch.setenv("RANK", "1")
        look(tmp_path)
        monkeypatch.delenv("RANK")
        logger.setLevel(logging.ERROR)
        try:
            look(tmp_path)
        finally:
            logger.setLevel(before)
    assert "verifying" not in screen.text()  # the bar before may be wiped out late


def test_where_no_one_sees_a_bar_one_line_at_level_info_says_what_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    caplog.set_level(logging.INFO)
    latest_checkpoint(run(tmp_path))
    lines = [record.getMessage() for record in caplog.records if record.name == "hf_lifecycle"]
    assert lines == ["verifying checkpoint-3: 0.0 GB to read"]
    assert capfd.readouterr().err == ""


def test_in_a_notebook_the_bar_is_tqdms_own_for_notebooks(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Notebook:
        """What tqdm.auto is there: ``disable=None`` is taken for False, and there is no terminal."""

        def __init__(self, **given: Any) -> None:
            self.disable, self.n = bool(given["disable"]), given["initial"]
            made.append(self)

        def update(self, size: int) -> None:
            self.n += size

        def close(self) -> None:
            pass

    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setitem(__import__("sys").modules, "tqdm.auto", SimpleNamespace(tqdm=Notebook))
    with reading("verifying checkpoint-3", 100) as advance:
        advance(10)
        advance(30)
    assert [bar.n for bar in made] == [40]
