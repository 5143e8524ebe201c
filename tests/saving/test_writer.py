"""One save in flight; what went wrong is told once, by the next or by who waits; an interpreter waits at its end."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.writer import Writer


def test_next_save_waits_for_the_one_in_flight() -> None:
    writer, gate, order = Writer(), threading.Event(), []
    writer.start(lambda blocks: (gate.wait(10), order.append("first")), "checkpoint-1", Path("run"))
    assert writer.busy
    threading.Timer(0.1, gate.set).start()
    writer.start(lambda blocks: order.append("second"), "checkpoint-2", Path("run"))
    assert order[0] == "first"
    writer.wait()
    assert order == ["first", "second"]
    assert not writer.busy


def test_work_begins_when_it_is_let_or_waited_for_or_after_a_second() -> None:
    for let in (Writer.begin, Writer.join, lambda _: None):
        writer, began = Writer(), threading.Event()
        writer.start(lambda blocks, began=began: began.set(), "checkpoint-1", Path("run"))
        assert not began.wait(0.2)
        let(writer)
        assert began.wait(10)
        writer.wait()


def test_failure_is_raised_once_with_checkpoint_file_and_cause() -> None:
    def work(blocks: Blocks) -> None:
        raise OSError(28, "No space left on device", "optimizer.pt")

    writer, later = Writer(), []
    writer.start(work, "checkpoint-1", Path("run"))
    with pytest.raises(SaveFailed, match=r"checkpoint-1 was not saved: OSError: .*No space left.*optimizer\.pt") as it:
        writer.start(lambda blocks: later.append("started"), "checkpoint-2", Path("run"))
    assert isinstance(it.value.__cause__, OSError)
    assert later == []
    assert writer.wait() < 1


@pytest.mark.parametrize("refused", ["hf_lifecycle-save", "hf_lifecycle-blocks"])
def test_save_without_a_thread_is_one_that_failed(
    refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, before = threading.Thread.start, set(threading.enumerate())

    def none_left(thread: threading.Thread) -> None:
        if thread.name == refused:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", none_left)
    writer, done = Writer(), []
    why = writer.start(done.append, "checkpoint-1", tmp_path)
    assert isinstance(why, RuntimeError)
    wait_for(tmp_path)  # nothing is under way there
    with pytest.raises(SaveFailed, match="checkpoint-1 was not saved: RuntimeError: can't start new thread"):
        writer.wait()
    assert (writer.wait() < 1, done, set(threading.enumerate())) == (True, [], before)


def test_no_thread_is_left_behind(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    writer = Writer()
    for number in range(3):

        def work(blocks: Blocks, number: int = number) -> None:
            with blocks.file(tmp_path / str(number)) as file:
                file.write(b"x")
            if number == 1:
                raise ValueError("no")

        writer.start(work, "checkpoint", tmp_path)
        if number == 1:
            with pytest.raises(SaveFailed):
                writer.wait()
    writer.wait()
    assert set(threading.enumerate()) == before


@pytest.mark.slow
@pytest.mark.parametrize("end", ["raise KeyboardInterrupt"])
def test_interpreter_waits_for_what_is_in_flight(end: str, tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from hf_lifecycle.saving.writer import Writer

def work(blocks):
    time.sleep(0.5)
    with blocks.file(Path({str(tmp_path / "file")!r})) as file:
        file.write(b"x" * 20_000_000)
    Path({str(tmp_path / "committed")!r}).touch()

Writer().start(work, "checkpoint-1", Path("run"))
{end}
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert (tmp_path / "committed").exists()
    assert (tmp_path / "file").stat().st_size == 20_000_000
    assert time.monotonic() - began < 30
