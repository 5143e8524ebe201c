"""What each rank of a launch runs: cases of the loop's matrix, unbroken and broken off, compared on this rank.

Arguments: a folder, and names of cases; with ``in the background`` after it, saves are not waited for, and there are
more of them. Each rank writes ``rank-N.json`` there: each name to its problems.
"""

from __future__ import annotations

import json
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from hf_lifecycle.processes.ranks import Ranks
from tests.resume.loops.cases import CASES
from tests.resume.loops.harness import Arm, LoopCase, aligned, run_broken, run_unbroken
from tests.resume.outcome import compare


def problems_of(case: LoopCase, folder: Path, arm: Arm = "manager") -> list[str]:
    """What differs on this rank."""
    if arm == "background":  # whose first save waits
        case = replace(case, options={**case.options, "every": 1})
    unbroken = run_unbroken(case, folder / case.name / "unbroken", "manager")
    # Several ranks have fewer batches each.
    case = replace(case, break_at=(max(5, len(unbroken.batches) * 2 // 3),))
    resumed = run_broken(case, folder / case.name / "broken", arm, unbroken)
    return compare(aligned(unbroken, resumed), resumed)


def main(folder: Path, names: list[str]) -> None:
    """Run the cases and write what was found."""
    dist.init_process_group("gloo")
    cases = {case.name: case for case in CASES}
    found: dict[str, list[str]] = {}
    for name in names:
        try:
            kind, _, background = name.partition(" in the ")
            found[name] = problems_of(
                replace(cases[kind], name=name), folder, "background" if background else "manager"
            )
        except Exception:  # noqa: BLE001 - it is told to the test
            found[name] = [traceback.format_exc()]
            break  # the other ranks may be elsewhere
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
