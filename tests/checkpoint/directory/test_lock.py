"""One run for each directory."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
from hf_lifecycle.errors import DirectoryInUse

HOLD = """
import os, sys
from pathlib import Path
from hf_lifecycle.checkpoint.directory.lock import DirectoryLock
DirectoryLock(Path(sys.argv[1])).acquire()
if os.fork() == 0:  # as a data worker that outlives its trainer for a while
    sys.stdin.read()
    os._exit(0)
print(os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def lock_file(tmp_path: Path) -> Path:
    (tmp_path / ".lifecycle").mkdir()
    return tmp_path / ".lifecycle" / "lock"


def test_another_process_is_refused_and_told_who_holds_it_until_that_one_dies(lock_file: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        pid = int(holder.stdout.readline())
        with pytest.raises(DirectoryInUse, match=f"process {pid} on .*, since ") as caught:
            DirectoryLock(lock_file).acquire()
        assert caught.value.directory == lock_file.parent.parent
        holder.kill()
        holder.wait()
        lock = DirectoryLock(lock_file)
        lock.acquire()  # though the child that was forked is alive
        lock.release()
    finally:
        holder.kill()
        holder.stdin.close()
        holder.stdout.close()
        holder.wait()


def test_one_process_may_take_it_twice_and_release_it_twice(lock_file: Path) -> None:
    first, second = DirectoryLock(lock_file), DirectoryLock(lock_file)
    first.acquire()
    second.acquire()
    second.release()
    first.release()
    assert lock_file.exists()
    assert f'"pid": {os.getpid()}' in lock_file.read_text()


def test_file_system_without_locks_is_one_warning(
    lock_file: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.lockf", refuse)
    for _ in range(2):
        lock = DirectoryLock(lock_file)
        lock.acquire()
        lock.release()
    assert caplog.text.count("this file system has no locks") == 1
