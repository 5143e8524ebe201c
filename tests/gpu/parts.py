"""Runs what ``run.sh`` runs, in parts with a time limit each, and writes down what came of them.

Promise: a part that hangs or dies costs the others nothing but its time, and what was found is written after each part:
``gpu.json`` (machine, versions, every test, every figure), ``gpu.txt`` (the same as a table) and ``gpu.log`` (what the
parts printed). Parts that do not measure run beside each other.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "transformers", "accelerate", "numpy", "safetensors", "triton", "isal", "xxhash")
_MOST_PRINTED = 50_000  # characters of a part in the log
_TEST = re.compile(r"^tests/gpu/(\S+?)\.py::(.+?) ?(PASSED|FAILED|ERROR|SKIPPED|$)")  # as it runs
_ENDED = re.compile(r"^(PASSED|FAILED|ERROR) tests/gpu/(\S+?)\.py::(.+?)(?: - |$)")  # in the summary
_STATES = {"": "begun", "PASSED": "passed", "FAILED": "failed", "ERROR": "failed", "SKIPPED": "skipped"}
_HEAD = "| state | saved by | stall per save (of stock's; worst) | whole cost per save (of stock's) | disk | memory |"


@dataclass
class Component:
    """One of them.

    Attributes:
        name: What it is called.
        arguments: Of Python.
        limit: Seconds.
        state: ``passed``, ``failed``, or ``over its limit``; ``left out`` where no time was left.
        tests: What became of each test, by name: ``passed``, ``failed``, ``skipped``; ``begun``, where it never ended.
        figures: What the benchmark has measured.
        table: The rows that it printed.
    """

    name: str
    arguments: list[str]
    limit: float
    state: str = "left out"
    seconds: float = 0.0
    tests: dict[str, str] = field(default_factory=dict)
    figures: list[dict[str, Any]] = field(default_factory=list)
    table: list[str] = field(default_factory=list)
    output: str = ""


def tests(name: str, files: list[str], limit: float) -> Component:
    """A part that runs tests of this folder."""
    paths = [f"tests/gpu/test_{file}_on_gpu.py" for file in files]
    options = [
        "-v",
        "--no-header",
        "--tb=short",
        "-rpfEs",
        "-p",
        "no:cacheprovider",
        "-o",
        f"timeout={limit * 0.8:.0f}",
    ]
    return Component(name, ["-m", "pytest", *options, *paths], limit)


def stall(size: float, limit: float, **settings: Any) -> Component:
    """A part that measures saves of a state of ``size`` GB."""
    given = [f"--{name}={value}" if value is not True else f"--{name}" for name, value in settings.items()]
    return Component(f"stall {size:g} GB", ["benchmarks/stall.py", f"--sizes={size}", "--rounds=1", *given], limit)


def planned(*, dry_run: bool) -> tuple[list[Component], list[list[Component]]]:
    """The parts that run one after the other, the last of all, and before them those that run beside each other."""
    beside = [
        [tests("memory", ["memory"], 60)],  # alone: it looks at how much memory is free
        [
            tests("random numbers and snapshots", ["rng", "snapshot"], 90),
            tests("Trainer", ["trainer"], 150),
            tests("loops", ["loop"], 120),
            tests("FSDP2", ["sharded"], 150),
        ],
    ]
    if dry_run:
        tiny = {"saves": 1, "steps": 4, "tokens": 8, "threads": 1, "settle": True, "fork": True}
        return [stall(0.01, 120, **tiny)], beside
    on_device = {"device": "cuda", "steps": 8, "tokens": 1024, "batch": 4}
    sizes = [
        stall(1, 90, saves=4, **on_device),
        stall(4, 110, saves=3, **on_device),
        stall(8, 160, saves=2, **on_device),
    ]
    return sizes, beside


def run(part: Component, folder: Path, seconds: float, env: dict[str, str]) -> None:
    """Run one part, with no more than these seconds."""
    limit, began = min(part.limit, seconds), time.monotonic()
    if limit <= 0:
        return
    figures, log = (folder / f"{part.name.replace(' ', '_')}.{kind}" for kind in ("json", "log"))
    more = [] if "pytest" in part.arguments else [f"--json={figures}", f"--folder={folder}"]
    with open(log, "w") as output:
        command = [sys.executable, *part.arguments, *more]
        streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=ROOT, env=env, **streams)
        try:
            part.state = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            part.state = "over its limit"
            _kill(process)
    part.seconds = time.monotonic() - began
    part.output = log.read_text(errors="replace")[-_MOST_PRINTED:]
    lines = part.output.splitlines()
    part.table = [line for line in lines if line.startswith("| ") and " GB |" in line]
    for found in filter(None, map(_TEST.match, lines)):
        part.tests[f"{found[1]}::{found[2]}"] = _STATES[found[3]]
    for found in filter(None, map(_ENDED.match, lines)):
        part.tests[f"{found[2]}::{found[3]}"] = _STATES[found[1]]
    if figures.exists():
        part.figures = json.loads(figures.read_text())


def _kill(process: subprocess.Popen[bytes]) -> None:
    """With all that it started, in sessions of their own, too."""
    with contextlib.suppress(psutil.NoSuchProcess):
        one = psutil.Process(process.pid)
        all_of_it = [*one.children(recursive=True), one]
        for each in all_of_it:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(all_of_it, timeout=3)  # a signal is on its way until then, and the next part measures
    process.wait()


def machine(env: dict[str, str]) -> dict[str, Any]:
    """What is here: the card, and the versions; asked in a process of its own, so that this one holds no device."""
    code = (
        "import json, torch; has = torch.cuda.is_available(); "
        "print(json.dumps({'card': torch.cuda.get_device_name() if has else 'none', "
        "'cards': torch.cuda.device_count() if has else 0, 'cuda': torch.version.cuda, "
        "'card_memory': torch.cuda.get_device_properties(0).total_memory if has else 0}))"
    )
    try:
        told = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90)
        found = json.loads(told.stdout) if told.returncode == 0 else {"card": told.stderr[-300:]}
    except subprocess.TimeoutExpired:
        found = {"card": "torch did not answer within 90 s"}
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**found, "python": platform.python_version(), "cpus": os.cpu_count(), "versions": versions}


def written(here: dict[str, Any], parts: list[Component]) -> str:
    """The table."""
    versions = ", ".join(f"{name} {version}" for name, version in here["versions"].items())
    lines = [
        f"card: {here['card']}, CUDA {here.get('cuda')}; {here['cpus']} CPUs; Python {here['python']}; {versions}",
        "",
        "| part | came of it | passed | failed | skipped | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for part in parts:
        counts = [str(list(part.tests.values()).count(state)) for state in ("passed", "failed", "skipped")]
        shown = counts if part.tests else [""] * 3
        lines.append(f"| {part.name} | {part.state} | {' | '.join(shown)} | {part.seconds:.0f} |")
    rows = [row for part in parts for row in part.table]
    if rows:
        lines += ["", _HEAD, "|---|---|---|---|---|---|", *rows]
    failed = [
        f"{part.name}: {name}: {state}"
        for part in parts
        for name, state in part.tests.items()
        if state in ("failed", "begun")
    ]
    failed += [f"{one.name}: {one.output.strip()[-1500:]}" for one in parts if one.state != "passed" and one.output]
    return "\n".join([*lines, *([""] if failed else []), *failed]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=470.0, help="seconds in all")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with tiny sizes")
    arguments = parser.parse_args()
    end, out = time.monotonic() + arguments.limit, arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "GPU_DRY_RUN": "1" if arguments.dry_run else "0"}
    if arguments.dry_run:
        env["CUDA_VISIBLE_DEVICES"] = ""
    else:
        env["FRESH_PROCESSES"] = "1"  # what a forked process has of a device is of no use
    last, beside = planned(dry_run=arguments.dry_run)
    parts = [*(part for group in beside for part in group), *last]
    here = machine(env)
    if not (arguments.dry_run or here.get("cards")):
        print(f"no card is here: {here['card']}; --dry-run tries the script on the CPU")
        return 1

    def note() -> None:
        facts = [{name: value for name, value in vars(part).items() if name != "output"} for part in parts]
        (out / "gpu.json").write_text(json.dumps({"machine": here, "parts": facts}, indent=1))
        (out / "gpu.txt").write_text(written(here, parts))
        (out / "gpu.log").write_text("\n".join(f"=== {part.name}\n{part.output}" for part in parts))

    with tempfile.TemporaryDirectory(dir=out.parent if out.parent.name == "runs" else None) as folder:
        for group in [*beside, *([part] for part in last)]:
            with ThreadPoolExecutor(max(1, min(len(group), os.cpu_count() or 1))) as pool:
                list(pool.map(lambda part: run(part, Path(folder), end - time.monotonic(), env), group))
            note()
    print((out / "gpu.txt").read_text(), end="")
    return 0 if all(part.state == "passed" for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
