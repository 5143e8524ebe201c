"""One attempt of a case in a process of its own, which can be killed: what a user's machine does to a run."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
from pathlib import Path

from .cases import CASES
from .harness import Arm, Attempt, Break, attempt
from .outcome import Outcome

__all__ = ["attempt_in_process"]


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _work(name: str, output_dir: Path, arm: Arm, resume: bool, killed_at: Break | None, answer: Path) -> None:
    # A spawned process would spawn its data workers too, each of which would import everything again.
    multiprocessing.set_start_method("fork", force=True)
    # A script's process has this name, and the seeded collators of transformers ask for it.
    multiprocessing.current_process().name = "MainProcess"
    case = next(case for case in CASES if case.name == name)
    outcome = attempt(
        case,
        Attempt(output_dir, arm),
        resume_from=True if resume else None,
        broken_at=killed_at,
        act=_kill_this_process,
    )
    answer.write_bytes(pickle.dumps(outcome))


def attempt_in_process(
    name: str, output_dir: Path, arm: Arm, *, resume: bool = False, killed_at: Break | None = None
) -> Outcome | None:
    """Call the training script of a case in a new process. None where it was killed.

    Raises:
        RuntimeError: The process ended in another way.
    """
    answer = output_dir.with_name("outcome.pickle")
    answer.parent.mkdir(parents=True, exist_ok=True)
    arguments = (name, output_dir, arm, resume, killed_at, answer)
    process = multiprocessing.get_context("spawn").Process(target=_work, args=arguments)
    process.start()
    process.join()
    if process.exitcode == -signal.SIGKILL and killed_at is not None:
        return None
    if process.exitcode != 0:
        raise RuntimeError(f"{name}: the process ended with {process.exitcode}")
    outcome: Outcome = pickle.loads(answer.read_bytes())
    return outcome
