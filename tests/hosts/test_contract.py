"""Damage, failed saves, retention and the mirror: alike under every host."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from hf_lifecycle import KeepEverySteps, KeepLast
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.listing import infos_in
from hf_lifecycle.checkpoint.directory.manifest import read_manifest
from hf_lifecycle.checkpoint.directory.retention import CheckpointInfo, RetentionPolicy
from hf_lifecycle.checkpoint.directory.store import problems_of, staging_folder
from hf_lifecycle.errors import SaveFailed
from tests.mirror.runs import fresh_url
from tests.saving.failing import fail_writes

from .trainings import HOSTS, Host

_FULL = r"checkpoint-4 was not saved: .*No space left.*model\.safetensors"


@pytest.fixture(params=HOSTS)
def host(request: pytest.FixtureRequest) -> Host:
    return HOSTS[request.param]


def steps_in(directory: Path) -> list[int]:
    return [info.step for info in infos_in(directory)]


def test_log_tells_of_each_save_what_it_cost_and_of_the_resume(host: Host, tmp_path: Path) -> None:
    host.train(tmp_path, until=4)
    host.train(tmp_path)
    events = [(event.event, event.facts) for event in read_events(tmp_path)]
    begun = [("started", 0), ("saved", 2), ("committed", 2)]
    written = [(name, 4) for name in ("asked", "snapshot", "written", "committed")]
    again = [("resumed", 4), ("saved", 6), ("committed", 6), ("ended", 6)]
    assert [(name, facts["step"]) for name, facts in events] == [*begun, *written, *again]
    last = dict(events)
    assert (last["resumed"]["path"], last["committed"]["path"]) == ("checkpoint-4", "checkpoint-6")
    assert last["asked"]["waited_seconds"] >= 0
    assert min(last["snapshot"]["bytes"], last["written"]["mb_per_second"], last["committed"]["stall_seconds"]) > 0
    assert last["committed"]["bytes"] == sum(file.size for file in read_manifest(tmp_path / "checkpoint-6").files)
    assert all(0 < facts["seconds"] < 60 for name, facts in events if name in ("saved", "committed", "resumed"))
    assert len({facts["attempt"] for _, facts in events if "attempt" in facts}) == 2


@pytest.mark.parametrize("kind", ["weights", "optimizer", "generators", "manifest"])
def test_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_resumes_exactly(
    host: Host, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"weights": "model.safetensors", "manifest": "lifecycle/manifest.json", **host._asdict()}
    host.train(tmp_path / "run", until=4)
    damaged = tmp_path / "run" / "checkpoint-4" / files[kind]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    assert host.train(tmp_path / "run") == host.train(tmp_path / "whole")
    assert "moved to damaged-checkpoint-4" in caplog.text
    assert (tmp_path / "run" / "damaged-checkpoint-4" / files[kind]).read_bytes() == bytes(content)


def test_failed_save_is_raised_at_the_next_one_with_file_and_cause_and_costs_nothing_committed(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_writes(monkeypatch)
    with pytest.raises(SaveFailed, match=_FULL):
        host.train(tmp_path)
    assert steps_in(tmp_path) == [2]
    assert list(staging_folder(tmp_path).iterdir()) == []
    host.train(tmp_path)
    assert problems_of(tmp_path / "checkpoint-6", full=True) == []


class KeepNothing(RetentionPolicy):
    """As careless as a policy of one's own can be."""

    def keep(self, infos: Any) -> set[CheckpointInfo]:
        return set()


def test_policies_decide_after_each_commit_and_never_cost_the_newest(host: Host, tmp_path: Path) -> None:
    host.train(tmp_path / "policies", keep=KeepLast(1) | KeepEverySteps(4))
    assert steps_in(tmp_path / "policies") == [4, 6]
    host.train(tmp_path / "careless", until=2, keep=KeepNothing())
    assert steps_in(tmp_path / "careless") == [2]
    host.train(tmp_path / "careless", keep=KeepNothing())
    assert steps_in(tmp_path / "careless") == [6]


@pytest.mark.parametrize("place", ["folder", "memory"])
def test_run_whose_disk_is_lost_goes_on_from_the_mirror_and_ends_with_the_same_bits(
    host: Host, place: str, tmp_path: Path
) -> None:
    url, out = fresh_url(place, tmp_path), tmp_path / "out"
    host.train(out, until=4, keep=KeepLast(1), mirror=url)
    assert [event.facts["step"] for event in read_events(out) if event.event == "mirrored"][-1] == 4
    shutil.rmtree(out)
    assert host.train(out, keep=KeepLast(1), mirror=url) == host.train(tmp_path / "whole")
    told = read_events(out)
    assert (told[0].event, told[0].facts["step"]) == ("resumed", 4)
    assert [event.facts["step"] for event in told if event.event == "mirrored"] == [6]
    if place == "folder":
        assert steps_in(tmp_path / "drive") == [6]
