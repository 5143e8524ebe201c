"""Runs every case with the callback and with stock Trainer, and writes the table docs/exactness.md.

From the repository's root: ``python -m tests.resume.report`` (``make matrix``). With names of cases it runs those,
prints every difference, and writes nothing.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import platform
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import get_args

from .cases import CASES, GROUPS
from .harness import Arm, Case, missing_packages, run_broken, run_unbroken
from .outcome import KINDS, compare, kind_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exactness.md"
VERSIONS = ("torch", "transformers", "accelerate", "datasets", "peft", "trl", "numpy")
SHOWN_KINDS = {"rng": "RNG", "stopping": "state that a user's object keeps"}


@dataclass(frozen=True, slots=True)
class Result:
    """One case in one arm: the differences found, or why it could not be run to its end."""

    case: str
    arm: str
    problems: tuple[str, ...] = ()
    error: str | None = None
    skipped: str | None = None

    @property
    def kinds(self) -> tuple[str, ...]:
        found = {kind_of(problem) for problem in self.problems}
        return tuple(kind for kind in KINDS if kind in found)

    @property
    def verdict(self) -> str:
        """A few words for the table."""
        if self.skipped is not None:
            return self.skipped
        if self.error is not None:
            return f"fails: {self.error}"
        if self.kinds in ((), ("train_loss",)):
            return "exact" if not self.kinds else "exact but for the mean loss"
        if set(self.kinds) <= {"log", "train_loss"}:
            return "log only"
        kinds = [SHOWN_KINDS.get(kind, kind) for kind in self.kinds if kind not in ("log", "train_loss", "scaler")]
        return ", ".join(kinds[:3])


def run(name: str, arm: Arm) -> Result:
    """Run one case in one arm."""
    case = next(case for case in CASES if case.name == name)
    missing = missing_packages(case)
    if missing:
        return Result(name, arm, skipped=f"needs {', '.join(missing)}")
    with tempfile.TemporaryDirectory() as place, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        try:
            unbroken = run_unbroken(case, Path(place, "unbroken", "run"), arm)
            problems = compare(unbroken, run_broken(case, Path(place, "broken", "run"), arm))
        except Exception as failure:  # noqa: BLE001  a failing case is a line of the table, not the end of the report
            return Result(name, arm, (traceback.format_exc(),), error=type(failure).__name__)
    return Result(name, arm, tuple(problems))


def prepare_process() -> None:
    """Make a process that was spawned like one that was started."""
    # A spawned process would spawn its data workers too, each of which would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    # A script's process has this name, and the seeded collators of transformers ask for it.
    multiprocessing.current_process().name = "MainProcess"
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def run_all(cases: Sequence[Case], processes: int) -> Iterator[Result]:
    """Run cases in both arms, as many at once as there are ``processes``."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=prepare_process) as pool:
        running = [pool.submit(run, case.name, arm) for case in cases for arm in get_args(Arm)]
        for future in running:
            yield future.result()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def installed(packages: Iterable[str]) -> str:
    """The versions of ``packages``."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def page(results: dict[tuple[str, str], Result]) -> str:
    """The page, as Markdown."""

    def verdicts(arm: Arm) -> list[str]:
        return [results[case.name, arm].verdict for case in CASES]

    total, ours, stock = len(CASES), verdicts("callback").count("exact"), verdicts("stock")
    whole, but_mean, log = (stock.count(words) for words in ("exact", "exact but for the mean loss", "log only"))
    lines = [
        "# What is exact",
        "",
        "Each case trains twice: once without interruption, and once interrupted and resumed. The two runs are "
        "compared bit for bit: weights and buffers, optimizer, scheduler, scaler, the RNG states of Python, NumPy and "
        "torch, every batch after the resume, the state of early stopping and of the user's objects, the best metric, "
        "and `log_history` without its wall-clock fields (`*_runtime`, `*_per_second`). The resumed run is created "
        "from nothing, with other global RNG states.",
        "",
        f"**With `LifecycleCallback`: {ours} of {total} are exact. With stock `Trainer`: {whole + but_mean} of "
        f"{total}, {log} more in everything but the log.**",
        "",
        "*Exact but for the mean loss*: the `train_loss` of the last log row is that of the part after the resume. "
        "Otherwise the table names what differs, causes first. In the cases of early stopping, stock `Trainer` has "
        "its own `EarlyStoppingCallback`.",
        "",
        f"Made by `make matrix` (`python -m tests.resume.report`) with {installed(VERSIONS)}, Python "
        f"{platform.python_version()}, on {_processor()} ({os.cpu_count()} cores, {platform.system()}), no GPU.",
    ]
    for group, cases in GROUPS.items():
        lines += [
            "",
            f"## {group}",
            "",
            "| case | what | stock `Trainer` | with `LifecycleCallback` |",
            "|---|---|---|---|",
        ]
        for case in cases:
            row = (
                f"`{case.name}`",
                case.about,
                results[case.name, "stock"].verdict,
                results[case.name, "callback"].verdict,
            )
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> int:
    """Run, print, write. The number of cases that are not exact with the callback."""
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        print(f"no such case: {', '.join(sorted(unknown))}")
        return 2
    chosen = [case for case in CASES if not names or case.name in names]
    started, results = time.monotonic(), {}
    for result in run_all(chosen, processes=max(os.cpu_count() or 1, 1)):
        results[result.case, result.arm] = result
        if result.arm == "stock":
            ours = results[result.case, "callback"]
            print(f"{result.case:28} stock: {result.verdict:40} callback: {ours.verdict}", flush=True)
        if names or (result.arm == "callback" and result.problems):
            print("".join(f"    {result.arm}: {problem}\n" for problem in result.problems), end="", flush=True)
    print(f"{len(chosen)} cases in {time.monotonic() - started:.0f} s")
    if not names:
        # The loops' section, which has a program of its own, stays.
        _, heading, loops = PAGE.read_text(encoding="utf-8").partition("\n## Loops on Accelerate\n")
        PAGE.write_text(page(results) + heading + loops, encoding="utf-8")
        print(f"wrote {PAGE.name}")
    return sum(bool(result.problems) for result in results.values() if result.arm == "callback")


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
