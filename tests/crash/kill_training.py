"""Kills a real training at every file operation of its saves, and proves after each kill that nothing is lost.

Run: ``python -m tests.crash.kill_training FOLDER [--host HOST] [--every N] [--random R]``. One process imports torch
once and forks the processes that are killed. A child counts what it asks of the file system (flush, rename, make and
remove directories and files) and kills itself with SIGKILL before its n-th request, for n = 1, 1 + N, 1 + 2 N and so on
until a run ends unkilled; then R children are killed by their parent at random times. After each kill:

- no directory named ``checkpoint-N`` is torn, as a script sees it that looks for the last one before it has a Trainer;
- the newest committed checkpoint is not older than before;
- the run that is resumed from it ends with the bits of the run that was never killed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from hf_lifecycle import KeepLast
from hf_lifecycle.checkpoint.directory.store import problems_of
from tests.hosts.trainings import HOSTS
from tests.processes import in_child

REQUESTS = ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir")
Train = Callable[..., dict[str, str]]
KINDS = {**HOSTS, "waiting-loop": HOSTS["loop"]._replace(train=partial(HOSTS["loop"].train, wait=True))}


def before_each_request(act: Callable[[int], object]) -> None:
    """From now on, ``act(n)`` is called before the n-th request to the file system."""
    numbers = itertools.count(1)

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **kwargs: Any) -> Any:
            act(next(numbers))
            return real(*args, **kwargs)

        return request

    for name in REQUESTS:
        setattr(os, name, counting(getattr(os, name)))


def die_before_request(number: int) -> None:
    """From now on, the ``number``-th request to the file system is not made: the process is killed instead."""
    before_each_request(lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == number else None)


def last_step(place: Path) -> int:
    """The step of what a script would resume from; it must be whole."""
    last = get_last_checkpoint(str(place)) if place.is_dir() else None
    if last is None:
        return 0
    problems = problems_of(Path(last), full=True)
    assert problems == [], problems
    return int(last.rpartition("-")[2])


def ends_as(train: Train, expected: dict[str, str]) -> None:
    """Resume, in another process, and compare."""

    def work() -> None:
        assert train() == expected, "the resumed run ended with other bits"

    assert in_child(work)[0] == 0


def kill_and_resume(
    train: Train, place: Path, begun: Path, expected: dict[str, str], kill: Callable[[Callable[[], object]], int]
) -> bool:
    """One broken run; whether it was killed at all. It goes on from ``begun``: one committed checkpoint to lose."""
    shutil.rmtree(place)
    shutil.copytree(begun, place)
    before = last_step(place)
    ended = kill(train)
    killed = ended < 0
    assert killed or ended == 0
    assert last_step(place) >= before > 0
    ends_as(train, expected)
    return killed


def main() -> None:
    """Kill, resume, compare; print how often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", choices=KINDS, default="Trainer")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--random", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    host = KINDS[options.host]
    expected = host.train(options.folder / "whole")
    place, number, kills = options.folder / "killed", 1, 0
    train = partial(host.train, place, keep=KeepLast(2))
    begun = options.folder / "begun"
    assert in_child(lambda: train(until=2))[0] == 0
    shutil.copytree(place, begun)

    def at_request(work: Callable[[], object]) -> int:
        def dying() -> None:
            die_before_request(number)
            work()

        return in_child(dying)[0]

    while kill_and_resume(train, place, begun, expected, at_request):
        kills, number = kills + 1, number + options.every
    moments, missed = random.Random(0), 0

    def at_random(work: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            work()
            os._exit(0)
        time.sleep(moments.uniform(0.02, 0.5))
        os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    for _ in range(options.random):
        missed += not kill_and_resume(train, place, begun, expected, at_random)
    print(
        f"{kills} kills at requests (the last run made fewer than {number}), {options.random - missed} at random times"
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main()
