"""Workers of real loaders, and real signals to their whole process group: who lives on, and who ends how.

Each case is a process of its own, in a process group of its own.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_lifecycle.processes import fork_server
from hf_lifecycle.processes.preemption import SignalWatch, put_back_left_over
from tests.processes import in_child, to_group

ROOT = Path(__file__).parent.parent
STUCK = 3  # the row that takes for ever


class Rows(Dataset):
    """Rows of which one can take for ever, and a worker that starts processes."""

    def __init__(self, stuck: bool = False, place: Path | None = None) -> None:
        self.stuck = stuck
        self.place = place

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> int:
        if index == STUCK and self.stuck:
            time.sleep(600)
        if index == 0 and self.place is not None:
            self.place.write_text("\n".join(map(str, start_processes())))
        return index


def start_processes() -> list[int]:
    """By exec and by fork, each of them good for minutes. Returns their ids."""
    forked = os.fork()
    if forked == 0:
        time.sleep(600)
        os._exit(0)
    return [os.getpid(), subprocess.Popen(["sleep", "600"]).pid, forked]


def is_there(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(is_so: Callable[[], bool], seconds: float = 20.0) -> bool:
    limit = time.monotonic() + seconds
    while not is_so() and time.monotonic() < limit:
        time.sleep(0.02)
    return is_so()


def listening(*signals: signal.Signals) -> SignalWatch:
    watch = SignalWatch(signals or (signal.SIGTERM, signal.SIGINT))
    watch.install(sys._getframe(1))
    return watch


def test_worker_lives_on_and_what_it_started_ends(tmp_path: Path) -> None:
    place = tmp_path / "processes"

    def work() -> Any:
        watch = listening()
        batches = iter(DataLoader(Rows(place=place), batch_size=1, num_workers=1))
        had = [next(batches)]
        worker, *started = map(int, place.read_text().split())
        assert all(map(is_there, (worker, *started)))
        to_group(signal.SIGTERM)
        assert wait_until(lambda: not any(map(is_there, started)))
        assert is_there(worker)
        had += list(batches)
        watch.put_back()
        return watch.received, torch.cat(had).tolist()

    assert in_child(work) == (0, (signal.SIGTERM, list(range(40))))


def test_handler_of_a_workers_own_is_the_one_in_force(tmp_path: Path) -> None:
    def set_handler(worker: int) -> None:
        signal.signal(signal.SIGTERM, lambda number, frame: (tmp_path / f"heard-{worker}").touch())

    def work() -> int:
        watch = listening()
        batches = iter(DataLoader(Rows(), batch_size=1, num_workers=1, worker_init_fn=set_handler))
        next(batches)
        to_group(signal.SIGTERM)
        assert wait_until((tmp_path / "heard-0").exists)
        watch.put_back()
        return len(list(batches))

    assert in_child(work) == (0, 39)


def test_stuck_worker_is_ended_with_its_loader_after_a_signal_that_it_was_spared() -> None:
    def work() -> Any:
        watch = listening()
        batches = iter(DataLoader(Rows(stuck=True), batch_size=1, num_workers=1))
        workers = list(batches._workers)
        next(batches)
        to_group(signal.SIGTERM)
        watch.put_back()
        workers[0].terminate()  # as torch does when it has waited
        time.sleep(0.05)  # torch would raise here what it did not mean
        return workers[0].exitcode, watch.received

    assert in_child(work) == (0, (-signal.SIGKILL, signal.SIGTERM))


def with_a_stuck_worker(place: Path, end: Callable[[SignalWatch], object] = lambda watch: None) -> Any:
    """Begin a loader of two workers of which one is stuck; send the group a signal; ``end`` this process."""
    watch = listening()
    batches = iter(DataLoader(Rows(stuck=True), batch_size=1, num_workers=2))
    next(batches)
    place.write_text(" ".join(str(worker.pid) for worker in batches._workers))
    to_group(signal.SIGTERM)
    end(watch)
    return watch, batches  # whoever keeps them leaves the workers to multiprocessing's end


def workers_told(place: Path) -> list[int]:
    return [int(word) for word in place.read_text().split()]


def test_workers_end_with_a_training_that_its_signal_ends(tmp_path: Path) -> None:
    place = tmp_path / "workers"
    status, _ = in_child(lambda: with_a_stuck_worker(place, lambda watch: watch.deliver(signal.SIGTERM)))
    assert status == -signal.SIGTERM
    assert not any(map(is_there, workers_told(place)))


@pytest.mark.slow
def test_workers_notice_that_the_training_was_killed_as_they_ever_did(tmp_path: Path) -> None:
    place = tmp_path / "workers"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        with_a_stuck_worker(place, lambda watch: os.kill(os.getpid(), signal.SIGKILL))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    at_work, stuck = workers_told(place)
    try:
        assert wait_until(lambda: not is_there(at_work))
    finally:
        os.kill(stuck, signal.SIGKILL)  # torch's worker looks for its parent between two batches


@pytest.mark.slow
def test_interpreters_end_waits_for_no_stuck_worker_and_is_silent(tmp_path: Path) -> None:
    place = tmp_path / "workers"
    script = f"""
from pathlib import Path
from tests.test_data_workers import with_a_stuck_worker
kept = with_a_stuck_worker(Path({str(place)!r}))
"""
    run = script_run("-c", script)
    assert (run.returncode, run.stderr) == (0, "")
    assert not any(map(is_there, workers_told(place)))


def script_run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        start_new_session=True,
    )


OTHERWISE = """
import multiprocessing, signal, sys, time
import torch
from torch.utils.data import DataLoader
from tests.test_data_workers import Rows, listening
from tests.processes import to_group

def sleep():
    time.sleep(600)

def through(loader, at):
    found = []
    for batch in loader:
        found.append(int(batch))
        if len(found) == at:
            to_group(signal.SIGTERM)
    return found

def main():
    watch = listening()
    method = sys.argv[1]
    context = multiprocessing.get_context(method)
    loader = DataLoader(Rows(), batch_size=1, num_workers=1, multiprocessing_context=context)
    # A worker that is spawned gets the signal before it can hear anything; one of a fork server once it works.
    batches = iter(loader)
    if method == "spawn":
        to_group(signal.SIGTERM)
    assert sorted(map(int, [next(batches)])) + through(batches, 3) == list(range(40))
    assert watch.received == signal.SIGTERM
    other = context.Process(target=sleep, daemon=True)
    other.start()
    other.terminate()
    other.join(60)
    assert other.exitcode == -signal.SIGTERM, other.exitcode
    watch.put_back()

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_worker_started_in_another_way_lives_on_and_other_processes_are_not_spared(method: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(OTHERWISE)
    run = script_run(script, method)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_process_of_a_fork_server_ends_by_a_signal_before_its_first_instruction(number: signal.Signals) -> None:
    def work() -> int:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # what is forked runs once this process waits
        fork_server._spare({number})
        os.kill(os.getpid(), number)
        ended = 0
        for _ in range(50):
            process = os.fork()
            if process == 0:
                signal.alarm(5)
                time.sleep(600)
            os.kill(process, number)
            ended += os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -number
        return ended

    assert in_child(work) == (0, 50)


def test_stateful_loader_of_torchdata_is_spared_too() -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader")

    def work() -> int:
        watch = listening()
        batches = iter(stateful.StatefulDataLoader(Rows(), batch_size=1, num_workers=1))
        next(batches)
        to_group(signal.SIGTERM)
        watch.put_back()
        return len(list(batches))

    assert in_child(work) == (0, 39)


def test_nothing_is_left_when_training_is_over_however_it_ended() -> None:
    before = BaseProcess.start

    def broken() -> SignalWatch:
        watch = listening()
        assert BaseProcess.start is not before
        return watch

    kept = broken()  # nobody put it back
    batches = iter(DataLoader(Rows(), batch_size=1, num_workers=1))
    assert BaseProcess.start is before, "whoever starts a worker first sees that it is over"
    assert len(list(batches)) == 40
    put_back_left_over()
    broken().put_back()
    assert BaseProcess.start is before
    assert kept.received is None
