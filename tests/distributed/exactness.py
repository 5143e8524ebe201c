"""Trains case after case on every rank: never broken off, then broken off and resumed; tells what differs.

Run by a launcher: ``... -m tests.distributed.exactness FOLDER CASE...``. Each rank writes ``FOLDER/rank-N.json``: of
each case the differences of its two runs on this rank, none where they are bit-equal, and digests of the unbroken one.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.cases import CASES
from tests.resume.harness import Case, run_broken, run_unbroken
from tests.resume.outcome import Outcome, compare, digest

__all__ = ["digests_of", "main", "train"]


def digests_of(outcome: Outcome) -> dict[str, str]:
    """One digest for each kind of state."""
    kinds: Mapping[str, Any] = {**outcome.parts, "log": outcome.log}
    batches = {"batches": {f"{step}/{micro}": batch for (step, micro), batch in outcome.batches.items()}}
    return {kind: digest(tree) for kind, tree in {**kinds, **batches}.items()}


def train(case: Case, folder: Path) -> dict[str, Any]:
    """The differences of the case's two runs on this rank, and digests of the unbroken one."""
    began = time.monotonic()
    unbroken = run_unbroken(case, folder / "whole" / "out", "callback")
    resumed = run_broken(case, folder / "broken" / "out", "callback")
    return {
        "differences": compare(unbroken, resumed),
        "digests": digests_of(unbroken),
        "started_at": resumed.started_at,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    """Train the cases that are named."""
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    told = {}
    for name in names:
        try:
            told[name] = train(next(case for case in CASES if case.name == name), folder / name)
        except Exception:  # noqa: BLE001  told to the test
            told[name] = {"differences": [traceback.format_exc()], "digests": {}}
            traceback.print_exc()
            break
        finally:
            rank = os.environ["RANK"]
            (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
