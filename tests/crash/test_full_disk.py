"""A disk that fills up in a real training: a clear error, nothing lost, nothing torn, and then the run goes on."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.place_of_save import require_space, size_of
from hf_lifecycle.errors import LifecycleError, NotEnoughSpace
from tests import preloaded

ROOT = Path(__file__).parents[2]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB, where the machine lets one be mounted."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root on Linux may mount a small file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"this machine mounts no small file system: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
def test_disk_that_fills_anywhere_in_a_save_costs_nothing_and_the_same_command_goes_on(
    small_disk: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "tests.crash.fill_disk", str(small_disk), str(tmp_path / "whole")]
    ended = preloaded.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    faults = re.findall(r"^NotEnoughSpace (\S+): no space", ended.stdout, re.MULTILINE)
    assert len(faults) >= 10
    assert set(faults) == {str(small_disk / "run")}
    assert "none" in ended.stdout.splitlines()  # so that it was full in every part of a save
    for said in ("went on", "went on in the background"):
        assert ended.stdout.splitlines().count(said) == 3


FIRST = """
import sys
from pathlib import Path
from hf_lifecycle import LifecycleCallback
from tests.trainer.runs import new_trainer

new_trainer(Path(sys.argv[1]), LifecycleCallback()).train()
"""


def test_first_save_that_fills_the_disk_says_so(small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - 20_000))
    command = [sys.executable, "-c", FIRST, str(small_disk / "run")]
    ended = preloaded.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (
        f"NotEnoughSpace: {small_disk / 'run'}: no space for a checkpoint: the first one fills the disk" in ended.stderr
    )
    assert "free some" in ended.stderr


LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.store import problems_of
from tests.crash.fill_disk import names, train
from tests.trainer.runs import break_off, new_trainer

torch.set_num_threads(1)
place, whole = Path(sys.argv[1]) / "run", Path(sys.argv[1]) / "whole"
expected = train(whole)
break_off(new_trainer(place, LifecycleCallback()), step=2)
before, unlimited = names(place), resource.RLIM_INFINITY
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in (0, 100, 500, 1000, 2000, 4000, 6000, 8000, 12000):
    trainer = new_trainer(place, LifecycleCallback())
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited))
    try:
        trainer.train(resume_from_checkpoint=True)
    except Exception as error:
        print("refused", type(error).__name__)
    else:
        raise AssertionError(f"files of {limit} bytes were enough")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    assert names(place) == before, names(place)
    assert problems_of(place / "checkpoint-2", full=True) == []
assert train(place) == expected
print("same bits")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX limits")
def test_limit_to_the_size_of_files_breaks_a_save_at_any_file_and_costs_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    ended = preloaded.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert len(re.findall("^refused", ended.stdout, re.MULTILINE)) == 9
    assert "same bits" in ended.stdout


def test_room_for_what_the_last_one_took_is_asked_for_and_the_error_tells_both(tmp_path: Path) -> None:
    last = tmp_path / "checkpoint-1"
    require_space(tmp_path, None)  # there is none
    last.mkdir()
    (last / "small").write_bytes(b"1")
    require_space(tmp_path, size_of(last))
    with open(last / "huge", "wb") as file:
        file.truncate(1 << 43)  # 8 TiB that take no room
    assert size_of(last) >= 1 << 43
    with pytest.raises(NotEnoughSpace, match="free some") as caught:
        require_space(tmp_path, size_of(last))
    error = caught.value
    assert isinstance(error, LifecycleError)
    assert isinstance(error, OSError)
    assert (error.errno, error.directory, error.needed) == (errno.ENOSPC, tmp_path, size_of(last))
    assert f"{error.needed:,}" in str(error)
    assert f"{error.free:,}" in str(error)


def test_bytes_of_an_unfinished_save_count_as_free(tmp_path: Path) -> None:
    last, unfinished = tmp_path / "checkpoint-1", tmp_path / "staging"
    for folder in (last, unfinished):
        folder.mkdir()
        with open(folder / "huge", "wb") as file:
            file.truncate(1 << 43)
    require_space(tmp_path, size_of(last), unfinished)
