"""The address by which programs import what verifies a checkpoint."""

from __future__ import annotations

from pathlib import Path

from hf_lifecycle.checkpoint.verification import verify
from tests.trainer.runs import saved_run


def test_checkpoint_is_verified_from_the_address_that_stays(tmp_path: Path) -> None:
    saved_run(tmp_path)
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert verify(newest) == []
    (newest / "model.safetensors").write_bytes(b"")
    assert any("model.safetensors" in problem for problem in verify(newest))
