"""A real SIGKILL at every request of a copy harms nothing here and leaves no torn copy there."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from tests import preloaded
from tests.mirror.server import S3

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL and fork")]


def killed(*arguments: str) -> int:
    """How many processes were killed before one was not."""
    command = [sys.executable, "-m", "tests.mirror.kill_worker", *arguments]
    done = preloaded.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    counted = re.search(r"(\d+) kills", done.stdout)
    assert counted is not None
    return int(counted[1])


def test_killed_anywhere_a_copy_to_a_folder_is_whole_or_not_there(tmp_path: Path) -> None:
    assert killed(str(tmp_path), str(tmp_path / "drive"), "6") > 5


def test_killed_anywhere_an_upload_to_s3_is_whole_or_not_there(tmp_path: Path, s3: S3) -> None:
    assert killed(str(tmp_path), s3.fresh_url(), "5", json.dumps(s3.options)) > 2
