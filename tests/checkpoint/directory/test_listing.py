"""What the manifests of a directory say of its checkpoints."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import pytest

from hf_lifecycle.checkpoint.directory.listing import infos_in
from hf_lifecycle.checkpoint.directory.manifest import Manifest, Metric, manifest_path
from hf_lifecycle.checkpoint.directory.retention import CheckpointInfo


def committed(directory: Path, step: int, metric: Metric | None, created: str) -> Path:
    path = directory / f"checkpoint-{step}"
    manifest_path(path).parent.mkdir(parents=True)
    manifest_path(path).write_bytes(Manifest("attempt", step, 1.0, 1, created, metric, ()).to_json())
    return path


def test_metric_and_time_come_from_the_manifest_and_the_oldest_first(tmp_path: Path) -> None:
    new = committed(tmp_path, 10, Metric("eval_loss", 0.0), "2024-05-01T06:00:00+00:00")
    old = committed(tmp_path, 9, None, "2024-05-01T05:00:00")
    assert infos_in(tmp_path) == [
        CheckpointInfo(9, old, None, datetime(2024, 5, 1, 5, tzinfo=timezone.utc)),
        CheckpointInfo(10, new, 0.0, datetime(2024, 5, 1, 6, tzinfo=timezone.utc)),
    ]


def test_without_a_manifest_that_can_be_read_there_is_neither(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-4").mkdir()  # no checkpoint
    manifest_path(committed(tmp_path, 2, None, "now")).write_bytes(b"{")
    committed(tmp_path, 3, Metric("eval_loss", 1.5), "yesterday")
    infos = infos_in(tmp_path)
    assert [(info.step, info.created) for info in infos] == [(1, None), (2, None), (3, None)]
    assert [info.metric for info in infos] == [None, None, 1.5]
    assert "checkpoint-2: its manifest cannot be read" in caplog.text


def test_no_directory_has_no_checkpoints(tmp_path: Path) -> None:
    assert infos_in(tmp_path / "none") == []
