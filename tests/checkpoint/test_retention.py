"""What is kept, decided without touching anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.retention import CheckpointInfo, KeepLast, doomed

INFOS = [CheckpointInfo(step, Path(f"/run/checkpoint-{step}")) for step in (3, 6, 9, 12)]


def steps(infos: list[CheckpointInfo]) -> list[int]:
    return [info.step for info in infos]


def test_the_last_are_kept_and_the_rest_goes_oldest_first() -> None:
    assert steps(doomed(INFOS, KeepLast(2))) == [3, 6]
    assert steps(doomed(reversed(INFOS), KeepLast(1))) == [3, 6, 9]  # type: ignore[arg-type]
    assert doomed(INFOS, KeepLast(4)) == []


def test_what_is_protected_and_the_newest_never_go() -> None:
    assert steps(doomed(INFOS, KeepLast(1), [Path("/run/checkpoint-3")])) == [6, 9]
    assert doomed(INFOS[:1], KeepLast(1)) == []


def test_keeping_none_is_refused() -> None:
    with pytest.raises(ValueError, match="count"):
        KeepLast(0)
