"""What rank 0 learns of the parts that others write: by files, from other processes, whatever becomes of them."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.manifest import FileEntry
from hf_lifecycle.engine.rank_parts import RankParts
from hf_lifecycle.errors import RankFailed, RankUnreachable
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.captured import SnapshotTorn

ENTRY = FileEntry("optimizer_0/__1_0.distcp", 7, "0" * 32)


def parts_of(rank: int, folder: Path, *, timeout: float = 60.0) -> RankParts:
    return RankParts(folder, "checkpoint-4", Ranks(rank, 2, timeout=timeout))


Start = Callable[[Callable[[RankParts], None]], RankParts]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., RankParts]]:
    """Rank 1 in a process of its own, which begins its part and does something with it; what rank 0 sees."""
    children = []

    def begin(work: Callable[[RankParts], None], *, timeout: float = 60.0, of_rank_1: float = 60.0) -> RankParts:
        child = os.fork()
        if child == 0:
            try:
                parts = parts_of(1, tmp_path / "parts", timeout=of_rank_1)
                parts.begin()
                work(parts)
            finally:
                os._exit(0)  # a thread of its own may beat still
        children.append(child)
        return parts_of(0, tmp_path / "parts", timeout=timeout)

    yield begin
    for child in children:
        os.waitpid(child, 0)


def test_part_that_is_written_is_told_with_its_files(start: Start) -> None:
    parts = start(lambda part: part.done([ENTRY], {"longer": [1, 2]})).wait()
    assert {rank: (part.files, part.facts) for rank, part in parts.items()} == {1: ((ENTRY,), {"longer": [1, 2]})}


def test_failure_is_told_by_name_also_where_the_disk_has_no_room_to_say_why(start: Start) -> None:
    def fail(part: RankParts) -> None:
        part.failed(OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(RankFailed, match=r"writing checkpoint-4: (.|\n)*rank 1: OSError: .*No space left on device"):
        start(fail).wait()


def test_failure_that_cannot_be_written_is_told_all_the_same(start: Start) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(part: RankParts) -> None:
        os.pwrite = refuse  # in this process alone
        part.failed(OSError(errno.ENOSPC, "No space left on device"))

    with pytest.raises(RankFailed, match="rank 1: it wrote neither its part nor an error"):
        start(fail).wait()


def test_snapshot_that_was_torn_on_another_rank_is_torn_here(start: Start) -> None:
    with pytest.raises(SnapshotTorn, match=r"rank 1: layers\.0\.weight changed between the save"):
        start(lambda part: part.failed(SnapshotTorn(["layers.0.weight"]))).wait()


def test_process_that_ends_before_its_part_is_told_is_found_long_before_the_time_limit(start: Start) -> None:
    began = time.monotonic()
    with pytest.raises(RankFailed, match="rank 1: its process has ended"):
        start(lambda part: None).wait()
    assert time.monotonic() - began < 30


def test_rank_that_gives_no_sign_is_waited_for_as_long_as_the_limit_and_its_files_are_left_alone(start: Start) -> None:
    parts = start(lambda part: time.sleep(4), timeout=1.0)  # which would give its first sign after 5 seconds
    with pytest.raises(RankUnreachable, match="writing checkpoint-4: rank 1 did not respond within 1 s"):
        parts.wait()
    assert not parts.wait_for_end()


def test_rank_that_writes_for_longer_than_the_limit_is_waited_for(start: Start) -> None:
    def write(part: RankParts) -> None:
        time.sleep(4)
        part.done([ENTRY], {})

    assert start(write, timeout=2.0, of_rank_1=2.0).wait()[1].files == (ENTRY,)


def test_part_of_a_save_that_is_given_up_before_a_thread_has_it_is_told_and_leaves_no_thread(
    start: Start, tmp_path: Path
) -> None:
    with pytest.raises(RankFailed, match="rank 1: KeyError: 'lost'"):
        start(lambda part: part.abandon(KeyError("lost"))).wait()
    parts = parts_of(1, tmp_path / "here")
    parts.begin()
    parts.abandon(KeyError("lost"))  # the tests' own watch over threads sees whether one is left
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["rank-1.failed"]
