"""A rank that is stopped is named on the others, which end; what was committed is intact, and the run resumes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of
from tests.preloaded import Popen

from .launching import ROOT, environment, told

pytestmark = pytest.mark.slow

LIMIT = 6


@contextmanager
def ranks(folder: Path, place: str, count: int = 2) -> Iterator[list[subprocess.Popen[str]]]:
    """Ranks without a launcher, which would wait 30 seconds for the one that is stopped."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = environment(HF_LIFECYCLE_TIMEOUT=str(LIMIT)) | {name: str(value) for name, value in given.items()}
        command = [sys.executable, "-m", "tests.distributed.silent_script", str(folder), place]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(Popen(command, cwd=ROOT, env=env, start_new_session=True, **pipes))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def run_on(folder: Path, count: int = 2) -> list[dict[str, str]]:
    with ranks(folder, "nowhere", count) as all_ranks:
        said = [process.communicate(timeout=200)[0] for process in all_ranks]
    assert [process.returncode for process in all_ranks] == [0] * count, said
    return told(folder, count)  # type: ignore[return-value]


def until_met(folder: Path) -> float:
    deadline = time.monotonic() + 120
    while not (folder / "met").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return time.monotonic()


@pytest.mark.parametrize(
    ("place", "newest", "says"),
    [
        ("step", 2, "rank 1 is silent for 6 s (HF_LIFECYCLE_TIMEOUT), last seen after step"),
        ("save", 2, "rank 1"),
        ("resume", 6, "rank 1"),
    ],
)
def test_stopped_rank_is_named_on_the_others_which_end_and_the_run_resumes(
    place: str, newest: int, says: str, tmp_path: Path
) -> None:
    if place == "resume":
        (tmp_path / "run").mkdir()
        run_on(tmp_path)
    count = 3 if place == "step" else 2
    with ranks(tmp_path, place, count) as (main, stopped, *others):
        stopped_at = until_met(tmp_path)
        said = [process.communicate(timeout=60)[0] for process in (main, *others)]
        took = time.monotonic() - stopped_at
        assert stopped.poll() is None
        os.kill(stopped.pid, signal.SIGCONT)
    assert all(process.returncode not in (0, None) for process in (main, *others)), said
    assert all(says in one for one in said), said
    assert took < 1.5 * LIMIT + 12
    kept = checkpoints_in(tmp_path / "run")
    assert kept[0][0] == newest
    assert all(problems_of(path, full=True) == [] for _, path in kept)
    if place == "step":
        (tmp_path / "whole").mkdir()
        assert run_on(tmp_path, count) == run_on(tmp_path / "whole", count)


def test_rank_whose_main_thread_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    with ranks(tmp_path, "wait") as (alive, _):
        until_met(tmp_path)
        assert alive.stdout is not None
        lines = []
        while not any("wait_for_what_never_comes" in line for line in lines):
            lines.append(alive.stdout.readline())
            assert lines[-1], lines
    assert any("rank 1 is at one place for 6 s, after step 3; its main thread:" in line for line in lines)
