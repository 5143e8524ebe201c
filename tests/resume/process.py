"""One attempt of a case in a process of its own, which can be killed: what a user's machine does to a run."""

from __future__ import annotations

import os
import pickle
import signal
import sys
from pathlib import Path

from tests import preloaded

from .cases import CASES
from .harness import Arm, Attempt, Break, attempt
from .outcome import Outcome

__all__ = ["attempt_in_process"]


def _kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _work(asked: Path, answer: Path) -> None:
    name, output_dir, arm, resume, killed_at = pickle.loads(asked.read_bytes())
    outcome = attempt(
        next(case for case in CASES if case.name == name),
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
    asked, answer = (output_dir.with_name(file) for file in ("asked.pickle", "outcome.pickle"))
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_bytes(pickle.dumps((name, output_dir, arm, resume, killed_at)))
    command = [sys.executable, "-m", __name__, str(asked), str(answer)]  # under the name that pytest gives the package
    ended = preloaded.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    if ended.returncode == -signal.SIGKILL and killed_at is not None:
        return None
    if ended.returncode != 0:
        raise RuntimeError(f"{name}: the process ended with {ended.returncode}")
    outcome: Outcome = pickle.loads(answer.read_bytes())
    return outcome


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
