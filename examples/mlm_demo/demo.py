"""Kill a training run, resume it, and compare it bit for bit with a run that was never interrupted.

For stock ``Trainer`` and for ``Trainer`` with ``LifecycleCallback``, ``train.py`` is started three times: once to its
end; once more, killed with SIGKILL in the middle; and again by the same command, which resumes from the newest
checkpoint. The two ways run side by side, one core each. The exit status is 0 only if the resumed run with the callback
ended with exactly the bits of the uninterrupted one.

    python examples/mlm_demo/demo.py [--quick] [--output-dir runs/mlm_demo]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparison import Finding, compare_ends, load_end
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
TITLES = {"stock": "stock Trainer", "lifecycle": "LifecycleCallback"}
INTRODUCTION = """\
Training a masked language model on the source of Python's standard library,
in two ways side by side: with stock Trainer (and its early stopping), and with
callbacks=[LifecycleCallback(...)]. Each is trained once without interruption,
once killed, and then resumed by the same command."""
# Some steps after a save (at 60 and 10), inside an epoch, and on no boundary of anything.
KILL_AT = {"full": 73, "quick": 13}


class DemoFailed(Exception):
    """A run did not do what the demo needs, so nothing can be said about exactness."""


class Display:
    """Progress bars in a terminal, and one plain line for each thing that happens."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.began = time.monotonic()
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )

    def bar(self, title: str, part: str) -> TaskID:
        return self.bars.add_task(f"{title:<17} {part:<16}", total=None, note="")

    def say(self, text: str) -> None:
        self.console.print(f"[{time.monotonic() - self.began:5.1f} s] {text}", markup=False, highlight=False)


@dataclass
class Process:
    """One start of ``train.py``, in a process group of its own so that its data workers go with it."""

    command: list[str]
    log: Path
    child: subprocess.Popen[str] = field(init=False)

    def __post_init__(self) -> None:
        quiet = {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        with self.log.open("ab") as log:
            self.child = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
                env={**os.environ, **quiet},
            )

    def told(self) -> Iterator[dict[str, Any]]:
        """What the script reports, until it ends; the lines that Trainer prints are skipped."""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith('{"'):
                yield json.loads(line)

    def kill(self) -> None:
        if self.child.poll() is None:
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()

    def close(self) -> None:
        self.kill()
        if self.child.stdout is not None:
            self.child.stdout.close()


class Arm(threading.Thread):
    """One way to train: the uninterrupted run, the killed one, and the resumed one."""

    def __init__(self, kind: str, folder: Path, display: Display, quick: bool) -> None:
        super().__init__(name=kind)
        self.kind, self.folder, self.display, self.quick = kind, folder, display, quick
        self.title = TITLES[kind]
        self.killed_at = 0
        self.failure: str | None = None
        self._process: Process | None = None
        self._cancelled = threading.Event()
        self._lock = threading.Lock()

    def run(self) -> None:
        try:
            self._train("uninterrupted", "uninterrupted")
            self.killed_at = self._train("broken", "to be killed", kill_at=KILL_AT["quick" if self.quick else "full"])
            self._train("broken", "resumed", resumed=True)
        except DemoFailed as failure:
            self.failure = str(failure)

    def cancel(self) -> None:
        """End the process that is running, and start no further one."""
        self._cancelled.set()
        with self._lock:
            if self._process is not None:
                self._process.kill()

    def findings(self) -> list[Finding]:
        return compare_ends(load_end(self.folder / "uninterrupted/end.pt"), load_end(self.folder / "broken/end.pt"))

    def _start(self, run: str) -> Process:
        command = [sys.executable, str(HERE / "train.py"), "--output-dir", str(self.folder / run)]
        command += ["--callback", self.kind, *(["--quick"] if self.quick else [])]
        with self._lock:
            if self._cancelled.is_set():
                raise DemoFailed("cancelled")
            self._process = Process(command, self.folder / f"{run}.log")
            return self._process

    def _train(self, run: str, part: str, kill_at: int | None = None, resumed: bool = False) -> int:
        """Start ``train.py``, follow it to its end or until it is killed, and return the last step that it reported."""
        bar = self.display.bar(self.title, part)
        process = self._start(run)
        step = 0
        try:
            for told in process.told():
                if "began_at" in told:
                    step = told["began_at"]
                    self.display.bars.update(bar, total=told["of"], completed=step)
                    if resumed:
                        self._check_resumption(step)
                elif "step" in told:
                    step = told["step"]
                    self.display.bars.update(bar, completed=step)
                    if kill_at is not None and step >= kill_at:
                        process.kill()
                        break
                elif "eval_loss" in told:
                    self.display.bars.update(bar, note=f"loss {told['eval_loss']:.3f}")
            code = process.child.wait()
        finally:
            process.close()
        return self._conclude(run, bar, step, code, killed=kill_at is not None)

    def _check_resumption(self, step: int) -> None:
        if not 0 < step < self.killed_at:
            raise DemoFailed(
                f"the run killed at step {self.killed_at} had to resume from a checkpoint, not step {step}"
            )
        self.display.say(f"{self.title}: resumed from checkpoint-{step}")

    def _conclude(self, run: str, bar: TaskID, step: int, code: int, killed: bool) -> int:
        if self._cancelled.is_set():
            raise DemoFailed("cancelled")
        if killed and code == -signal.SIGKILL:
            self.display.bars.update(bar, note="SIGKILL")
            self.display.bars.stop_task(bar)
            self.display.say(f"{self.title}: killed (SIGKILL) after step {step}")
        elif not killed and code == 0:
            self.display.bars.update(bar, total=step)
            self.display.bars.stop_task(bar)
            what = {"uninterrupted": "uninterrupted", "broken": "resumed"}[run]
            self.display.say(f"{self.title}: {what}, ended at step {step}")
        else:
            log = (self.folder / f"{run}.log").read_text(encoding="utf-8", errors="replace")
            raise DemoFailed(f"train.py ended with status {code} at step {step}:\n{log[-2000:]}")
        return step


def train_side_by_side(arms: list[Arm], display: Display) -> None:
    """Run all arms to their end. Ctrl-C, like any error, leaves no process behind."""
    with display.bars:
        try:
            for arm in arms:
                arm.start()
            while any(arm.is_alive() for arm in arms) and not any(arm.failure for arm in arms):
                time.sleep(0.1)
        finally:
            for arm in arms:
                arm.cancel()
            for arm in arms:
                if arm.ident is not None:
                    arm.join()


def show_table(console: Console, findings: dict[str, list[Finding]]) -> None:
    table = Table(title="Killed and resumed, compared with an uninterrupted run", padding=(0, 1))
    table.add_column("", no_wrap=True)
    for kind in findings:
        table.add_column("stock Trainer" if kind == "stock" else "with LifecycleCallback")
    for row in zip(*findings.values(), strict=True):
        table.add_row(row[0].subject, *(f"[{'green' if f.identical else 'red'}]{f.words}[/]" for f in row))
    console.print(table)


def verdict(findings: dict[str, list[Finding]], killed_at: int) -> str:
    exact = {kind: all(finding.identical for finding in rows) for kind, rows in findings.items()}
    ours = "ended with exactly the bits of" if exact["lifecycle"] else "did NOT end with the bits of"
    theirs = "So did stock Trainer's." if exact["stock"] else "Stock Trainer's did not."
    if not exact["lifecycle"]:
        theirs = "Stock Trainer's did." if exact["stock"] else "Nor did stock Trainer's."
    return (
        f"With LifecycleCallback, the run that was killed at step {killed_at} and resumed {ours} the uninterrupted "
        f"run. {theirs}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/mlm_demo"))
    parser.add_argument("--quick", action="store_true", help="a toy size, for tests")
    options = parser.parse_args()

    for number in (signal.SIGINT, signal.SIGTERM):  # also where it was started in the background, SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    console = Console(highlight=False)
    console.print(INTRODUCTION, markup=False)
    display = Display(console)
    arms = [Arm(kind, options.output_dir / kind, display, options.quick) for kind in TITLES]
    for arm in arms:
        shutil.rmtree(arm.folder, ignore_errors=True)
        arm.folder.mkdir(parents=True)
    try:
        train_side_by_side(arms, display)
    except KeyboardInterrupt:
        console.print("Interrupted; every process was ended.")
        return 130
    failures = [f"{arm.title}: {arm.failure}" for arm in arms if arm.failure and arm.failure != "cancelled"]
    if failures:
        console.print("\n".join(failures), markup=False, style="red")
        return 2
    findings = {arm.kind: arm.findings() for arm in arms}
    show_table(console, findings)
    console.print(verdict(findings, next(arm.killed_at for arm in arms if arm.kind == "lifecycle")))
    console.print(f"Took {time.monotonic() - display.began:.0f} s; the runs are in {options.output_dir}.", markup=False)
    return 0 if all(finding.identical for finding in findings["lifecycle"]) else 1


if __name__ == "__main__":
    raise SystemExit(main())
