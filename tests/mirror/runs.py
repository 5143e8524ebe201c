"""Checkpoints of a few bytes, committed as real ones are, and places to copy them to."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.manifest import Manifest, Metric
from hf_lifecycle.checkpoint.directory.store import commit, staging_folder
from hf_lifecycle.mirror.settings import Mirror

__all__ = ["CONTENT", "Told", "files_of", "fresh_url", "make", "nothing", "steps_at"]

CONTENT = {"model.safetensors": b"weights" * 99, "trainer_state.json": b"{}", "lifecycle/rank-00000.safetensors": b"x"}


def make(directory: Path, step: int, *, metric: float | None = None, attempt: str = "a", **content: bytes) -> Path:
    """Commit a checkpoint whose files tell its step."""
    staged = staging_folder(directory) / f"checkpoint-{step}"
    for name, data in {**CONTENT, "step.bin": b"%d" % step, **content}.items():
        (staged / name).parent.mkdir(parents=True, exist_ok=True)
        (staged / name).write_bytes(data)
    final, judged = directory / f"checkpoint-{step}", None if metric is None else Metric("eval_loss", metric)
    created = f"2026-01-01T00:{step % 60:02}:00+00:00"
    commit(staged, final, lambda files: Manifest(attempt, step, step / 4, 1, created, judged, files))
    return final


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Every file by its name."""
    return {
        path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }


def fresh_url(kind: str, tmp_path: Path) -> str:
    """A place that nobody has used: the memory of fsspec is one for the whole process."""
    return {"folder": str(tmp_path / "drive"), "memory": f"memory://{secrets.token_hex(8)}/run"}[kind]


def nothing(_bytes: int) -> None:
    """Takes what progress tells."""


class Told(list[tuple[str, int]]):
    """An event log that remembers what it was told, with the facts in ``facts``."""

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []

    def __call__(self, event: str, step: int, **facts: Any) -> None:
        self.facts.append(facts)
        self.append((event, step))


def steps_at(mirror: Mirror) -> list[int]:
    """The steps of the whole copies at a mirror, newest first."""
    return [copy.step for copy in mirror.open().look().copies if not copy.problems]
