"""How files are written is tested on a disk, which alone refuses direct writes that are not aligned."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def _on_disk() -> Iterator[Path]:
    """Where the system has its temporary files. Removed at the end: before, a test may have replaced ``os.open``."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def tmp_path(_on_disk: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=_on_disk))
