"""Trains in a directory until its disk is full, frees space, and goes on; run by ``test_full_disk`` in a process.

Run: ``python -m tests.crash.fill_disk FOLDER WHOLE`` with ``FOLDER`` on a small file system and ``WHOLE`` on another.
A file of ballast is made a little longer each time, so that the disk fills at one place of the save after the other:
before it, in Trainer's writing, in what this package adds, in the manifest. At the end one training goes on over a full
disk, by ``on_save_failure="continue"``.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.utils import logging

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.lock import wait_for
from hf_lifecycle.checkpoint.directory.place_of_save import size_of
from hf_lifecycle.checkpoint.directory.store import problems_of
from hf_lifecycle.engine import run_directory
from hf_lifecycle.errors import NotEnoughSpace, SaveFailed
from tests.trainer.runs import break_off, digests, new_trainer

STEPS = 40


def train(place: Path) -> dict[str, str]:
    """The same command each time: start, or go on."""
    trainer = new_trainer(place, LifecycleCallback())
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    return digests(trainer)


def names(place: Path) -> list[str]:
    """What a person sees in the directory, and what lies in the staging folder."""
    return sorted(path.name for path in (*place.iterdir(), *(place / ".lifecycle" / "staging").glob("*")))


def fill(ballast: Path, free: int) -> None:
    """Leave ``free`` bytes of the disk."""
    ballast.write_bytes(b"")
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(ballast.parent).free - free)


def fault_with(place: Path, ballast: Path, free: int) -> NotEnoughSpace | SaveFailed | None:
    """Go on from the first checkpoint with ``free`` bytes; the fault, after which nothing but the ballast is new."""
    shutil.rmtree(place, ignore_errors=True)
    ballast.unlink(missing_ok=True)
    break_off(new_trainer(place, LifecycleCallback()), step=2)
    before = names(place)
    fill(ballast, free)
    try:
        train(place)
    except (NotEnoughSpace, SaveFailed) as error:  # the latter where the background met the full disk
        assert set(before) <= set(names(place)), names(place)
        assert [name for name in names(place) if name not in before] in ([], ["checkpoint-4"]), names(place)
        for name in names(place):
            if name.startswith("checkpoint-"):
                assert problems_of(place / name, full=True) == []
        return error
    return None


class FullForAWhile(TrainerCallback):
    """The disk is full when the second save comes, and until the event log tells that it failed."""

    def __init__(self, place: Path, ballast: Path, free: int) -> None:
        self._place, self._ballast, self._free = place, ballast, free

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            wait_for(self._place)  # for the first save, which is to be there
            fill(self._ballast, self._free)
        elif state.global_step == 5:
            deadline = time.monotonic() + 60
            while failures_in(self._place) == []:  # the save may be under way in the background
                assert time.monotonic() < deadline, "no save failed"
                time.sleep(0.01)
            self._ballast.unlink()


def failures_in(place: Path) -> list[Any]:
    """The steps of the saves that failed."""
    return [event.facts["step"] for event in read_events(place) if event.event == "failed"]


def goes_on(place: Path, ballast: Path, free: int, *, in_background: bool) -> dict[str, str]:
    """Train over a disk that is full for a while; what is there at the end is as if that save had not been due."""
    shutil.rmtree(place, ignore_errors=True)
    ballast.unlink(missing_ok=True)
    callback = LifecycleCallback(on_save_failure="continue", async_save=in_background)
    trainer = new_trainer(place, FullForAWhile(place, ballast, free), callback)
    trainer.train()
    assert [name for name in names(place) if "checkpoint" in name] == ["checkpoint-2", "checkpoint-6"], names(place)
    assert all(problems_of(place / name, full=True) == [] for name in ("checkpoint-2", "checkpoint-6"))
    assert failures_in(place) == [4]
    asked = {event.facts["step"] for event in read_events(place) if event.event == "asked"}
    assert 6 in asked if in_background else not asked
    return digests(trainer)


def main() -> None:
    """Fill, look, free, go on, compare; one line for each fault."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    folder, whole = Path(sys.argv[1]), Path(sys.argv[2])
    place, ballast = folder / "run", folder / "ballast"
    expected = train(whole)
    one = size_of(whole / "checkpoint-2")
    checked = run_directory.require_space

    def only_afterwards(directory: Path, needed: int | None, unfinished: Path | None = None) -> None:
        if unfinished is not None:
            checked(directory, needed, unfinished)

    for asks in (True, False):
        # Without the question beforehand, as when another process fills the disk after it, Trainer meets the fault.
        run_directory.require_space = checked if asks else only_afterwards
        for part in range(0, STEPS + 1, 16 if asks else 2):
            error = fault_with(place, ballast, int(one * 2.4 * part / STEPS))
            if error is None:
                print("none")
                continue
            if isinstance(error, NotEnoughSpace):
                assert error.free < error.needed
            else:
                assert isinstance(error.cause, OSError)
                assert error.cause.errno == errno.ENOSPC
                assert ".lifecycle/staging/checkpoint-" in str(error)  # the file is named
            ballast.unlink()
            assert train(place) == expected
            print(type(error).__name__, error)
    for in_background in (True, False):
        for part in (0, 10, 20):
            assert goes_on(place, ballast, one * part // STEPS, in_background=in_background) == expected
            print("went on in the background" if in_background else "went on")


if __name__ == "__main__":
    main()
