"""A process that ends, by an exception too, waits for the copy that is under way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_lifecycle.mirror.settings import Mirror
from tests.mirror.runs import make, steps_at
from tests.mirror.server import S3

PROGRAM = """
import json, sys
from pathlib import Path
from hf_lifecycle.mirror.worker import MirrorWorker
from hf_lifecycle.mirror.settings import Mirror

out, url, options = sys.argv[1:]
MirrorWorker(Mirror(url, json.loads(options)), Path(out), lambda *_, **__: None).offer(Path(out) / "checkpoint-4")
raise SystemExit("training raised")
"""


@pytest.mark.slow
def test_end_of_the_process_waits_for_the_copy_though_its_client_needs_threads(tmp_path: Path, s3: S3) -> None:
    make(tmp_path / "out", 4)
    # By name: a client looks it up in a thread pool, which the end of the interpreter takes away from it.
    options = {**s3.options, "endpoint_url": f"http://localhost:{s3.port}"}
    url = s3.fresh_url()
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "out"), url, json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "training raised")
    assert steps_at(Mirror(url, s3.options)) == [4]
