"""Runs every loop with the manager and by Accelerate's recipe, and writes its section of docs/exactness.md.

From the repository's root: ``python -m tests.resume.loops.table`` (a part of ``make matrix``). With names of cases it
runs those, prints every difference, and writes nothing.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

from ..outcome import compare
from ..report import PAGE, Result, installed, prepare_process
from .cases import CASES
from .harness import Arm, aligned, run_broken, run_unbroken

HEADING = "## Loops on Accelerate"
VERSIONS = ("torch", "accelerate", "torchdata", "numpy")


def run(name: str, arm: Arm) -> Result:
    """Run one case in one arm."""
    case = next(case for case in CASES if case.name == name)
    with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            unbroken = run_unbroken(case, Path(place, "unbroken"), arm)
            resumed = run_broken(case, Path(place, "broken"), arm, unbroken)
            problems = compare(aligned(unbroken, resumed), resumed)
        except Exception as failure:  # noqa: BLE001  a failing case is a line of the table, not the end of the report
            return Result(name, arm, (repr(failure),), error=type(failure).__name__)
    return Result(name, arm, tuple(problems))


def section(results: dict[tuple[str, str], Result]) -> str:
    """The section, as Markdown."""
    exact = {arm: sum(results[case.name, arm].verdict == "exact" for case in CASES) for arm in get_args(Arm)}
    lines = [
        HEADING,
        "",
        f"**With `TrainingStateManager`: {exact['manager']} of {len(CASES)} are exact, and with `save(wait=False)` "
        f"{exact['background']}. With Accelerate's own recipe: {exact['recipe']} of {len(CASES)}.** The recipe is that "
        "of its guide on checkpoints: `save_state` into a folder named after the step or the epoch, `load_state`, "
        "`skip_first_batches`. Compared are weights, optimizers, schedulers, RNG states, every batch and loss after "
        "the resume, and the state of the objects. The run resumed with the manager has another seed than the first "
        "one; with the recipe it has the same.",
        "",
        f"Made by `python -m tests.resume.loops.table` with {installed(VERSIONS)}, no GPU. "
        "`tests/distributed/test_loop_ranks.py` compares many of these cases on every rank of 2 and 4 processes.",
        "",
        "| case | what | Accelerate's recipe | with `TrainingStateManager` |",
        "|---|---|---|---|",
    ]
    for case in CASES:
        recipe, manager = (results[case.name, arm].verdict for arm in ("recipe", "manager"))
        lines.append(f"| `{case.name}` | {case.about} | {recipe} | {manager} |")
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    """Run, print, write. The number of cases that are not exact with the manager."""
    chosen = [case for case in CASES if not names or case.name in names]
    started, results = time.monotonic(), {}
    with ProcessPoolExecutor(
        max(os.cpu_count() or 1, 1), mp_context=get_context("spawn"), initializer=prepare_process
    ) as pool:
        running = [pool.submit(run, case.name, arm) for case in chosen for arm in get_args(Arm)]
        for result in (future.result() for future in running):
            results[result.case, result.arm] = result
            print(f"{result.case:20} {result.arm:10} {result.verdict}", flush=True)
            if names or (result.arm != "recipe" and result.problems):
                print("".join(f"    {problem}\n" for problem in result.problems), end="", flush=True)
    print(f"{len(chosen)} cases in {time.monotonic() - started:.0f} s")
    if not names:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(HEADING)
        _, following, after = rest.partition("\n## ")  # what is written by hand
        PAGE.write_text(f"{before.rstrip()}\n\n{section(results)}{following}{after}", encoding="utf-8")
        print(f"wrote the loops' section of {PAGE.name}")
    return sum(bool(result.problems) for result in results.values() if result.arm != "recipe")


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
