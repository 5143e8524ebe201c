"""Kills or stops one rank of a sharded training in a background save, wherever it is; nothing may be lost.

Run: ``python -m tests.crash.kill_ranks FOLDER [--kind KIND ...] [--ranks N] [--kills N] [--seed N]``. One process
imports torch once and forks the ranks. A first run notes on each rank what of this package is called, and returned
from, while saves are made in the background: on the training thread, in the copy, in the writing of its part, between
that and rank 0's commit, in rank 0's merge. Then as many moments as asked for are drawn from these, each of a rank, and
in a run of its own that rank is killed there with SIGKILL, or stopped with SIGSTOP. After each:

- every other rank ends by itself, and says which rank was missing, unless torch's own collectives told it first that a
  connection is closed;
- each directory named ``checkpoint-N`` is intact, and the newest is at least the last that was logged as committed;
- the ranks resume from it, end with the bits of the run that was never killed, and leave nothing in the staging folder.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers.utils import logging

import hf_lifecycle
from hf_lifecycle import latest_checkpoint
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of
from hf_lifecycle.engine.shared_saves import SharedSaves
from tests.distributed.sharded_cases import engine, engine_plugin, sharded
from tests.distributed.shards_script import run_loop, trained
from tests.resume.harness import Attempt

PACKAGE = str(Path(hf_lifecycle.__file__).parent)
STAGES = {
    "copy": ("saving/snapshots/", "saving/captured", "saving/carrying", "hosts/"),
    "writing": ("saving/files/", "saving/sharded/", "checkpoint/files/"),
    "its part": ("engine/rank_parts", "engine/save_session", "saving/task", "saving/writer"),
    "merge": ("engine/shared_saves", "engine/background_saves", "engine/run_directory", "checkpoint/directory/"),
}
OF_TORCH = "gloo/transport"  # where its collectives find that a connection is closed
HANGS = 200.0  # seconds; a collective of torch's waits for half an hour
Moment = tuple[str, int, signal.Signals]  # what is called, or returned from; for the how manieth time; and the signal
Train = Callable[
    [Path], dict[str, str]
]  # in a folder, from its newest checkpoint or anew; digests of what it ends with


class Moments:
    """What of the package is called on this rank from the first background save on; kills the process at one of them.

    Args:
        at: Where to kill.
    """

    def __init__(self, at: Moment | None = None) -> None:
        self.counts: dict[str, int] = {}
        self._at = at
        own = SharedSaves.begin

        def begin(saves: SharedSaves[Any]) -> None:
            if saves.template is not None:
                threading.setprofile(self._note)
                sys.setprofile(self._note)
            own(saves)

        SharedSaves.begin = begin  # type: ignore[method-assign]

    def _note(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event in ("call", "return") and code.co_filename.startswith(PACKAGE):
            place = f"{code.co_filename[len(PACKAGE) + 1 :]}:{code.co_name} {event}"
            count = self.counts[place] = self.counts.get(place, 0) + 1
            if self._at is not None and (place, count) == self._at[:2]:
                os.kill(os.getpid(), self._at[2])


def loop(folder: Path, kind: str) -> dict[str, str]:
    """A custom loop, of which every save is in the background but the first."""
    return run_loop(folder, kind=kind, resumes=True)


def trainer(folder: Path, kind: str) -> dict[str, str]:
    """Trainer likewise."""
    one = sharded(Attempt(folder, "callback"), kind, eval_strategy="no")
    one.train(resume_from_checkpoint=latest_checkpoint(folder))
    return trained(one.model, one.optimizer)


def loop_zero(folder: Path, stage: int) -> dict[str, str]:
    """A loop under DeepSpeed, with ZeRO of this stage."""
    return run_loop(folder, settings=engine_plugin(stage), resumes=True)


def trainer_zero(folder: Path, stage: int) -> dict[str, str]:
    """Trainer likewise."""
    one = engine(Attempt(folder, "callback"), stage, eval_strategy="no")
    one.train(resume_from_checkpoint=latest_checkpoint(folder))
    return trained(one.model, one.optimizer)


KINDS: dict[str, Train] = {
    f"{host.__name__}-{name}": functools.partial(host, kind=kind)  # type: ignore[operator]
    for host in (loop, trainer)
    for name, kind in (("sharded", "SHARDED_STATE_DICT"), ("full", "FULL_STATE_DICT"))
}
if importlib.util.find_spec("deepspeed") is not None:
    # Not the loop with ZeRO-3: DeepSpeed pads the last part with uninitialized memory, which is other in each run.
    KINDS["loop-zero-2"] = functools.partial(loop_zero, stage=2)
    KINDS |= {f"trainer-zero-{stage}": functools.partial(trainer_zero, stage=stage) for stage in (2, 3)}


def run(
    train: Callable[[Path], dict[str, str]], folder: Path, ranks: int, kill: Mapping[int, Moment | None] | None = None
) -> Any:
    """Train on forked processes. Returns how each ended, and the path of what each has told and printed.

    Args:
        train: The training.
        folder: Of its run.
        ranks: How many processes.
        kill: The ranks whose moments are noted, and at which of them they are killed.
    """
    kill = kill or {}
    told = folder.parent / "told"
    shutil.rmtree(told, ignore_errors=True)
    told.mkdir(parents=True)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as torchrun's agent has it
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}

    def work(rank: int) -> None:
        # A killed one is waited for; with less, one may be missed that is only slow.
        os.environ.update(rendezvous, HF_LIFECYCLE_TIMEOUT="8" if any(kill.values()) else "60")
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
        with open(told / f"rank-{rank}.log", "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        moments = Moments(kill[rank]) if rank in kill else None
        digests = train(folder)
        sys.setprofile(None)
        found = {"digests": digests, "counts": moments and moments.counts, "modules": list(sys.modules)}
        (told / f"rank-{rank}.json").write_text(json.dumps(found))

    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(rank)
                status = 0
            except BaseException:  # noqa: BLE001  the parent sees the status, and whoever reads the log the text
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children[child] = rank
    ended: dict[int, int] = {}
    stopped: list[int] = []
    deadline = time.monotonic() + HANGS
    while len(ended) < ranks:
        for child in [one for one, rank in children.items() if rank not in ended]:
            done, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
            if done and os.WIFSTOPPED(status):
                stopped.append(child)
            elif done:
                ended[children[child]] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline or (child in stopped and len(ended) + len(stopped) == ranks):
                os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    hung = [rank for rank, status in ended.items() if status == -signal.SIGKILL and rank not in kill]
    assert not hung, f"rank {hung[0]} hung:\n" + printed(told, ranks)[hung[0]]
    return [ended[rank] for rank in range(ranks)], told


def import_all(names: list[str]) -> None:
    """Import once what each training has imported, so that it need not be by every process that is forked."""
    for name in names:
        with suppress(ImportError):
            importlib.import_module(name)
    gc.collect()
    gc.freeze()


def results(told: Path, ranks: int, key: str) -> list[dict[str, Any]]:
    """What each rank has told."""
    return [json.loads((told / f"rank-{rank}.json").read_text())[key] for rank in range(ranks)]


def printed(told: Path, ranks: int) -> list[str]:
    """What each rank has printed."""
    return [(told / f"rank-{rank}.log").read_text() for rank in range(ranks)]


def require_nothing_lost(folder: Path) -> int:
    """The step of the newest checkpoint; all are intact, and none that was committed is missing."""
    found = checkpoints_in(folder)
    for _, checkpoint in found:
        assert problems_of(checkpoint, full=True) == [], checkpoint
    newest = max((step for step, _ in found), default=0)
    committed = [event.facts["step"] for event in read_events(folder) if event.event == "committed"]
    assert newest >= max(committed, default=0), (newest, committed)
    return newest


def kill_and_resume(kind: str, folder: Path, ranks: int, expected: list[Any], rank: int, moment: Moment) -> bool:
    """One broken run, and the one that resumes it. Returns whether there was a kill."""
    train = KINDS[kind]
    ended, told = run(train, folder, ranks, {rank: moment})
    if ended[rank] == 0:
        return False
    said = printed(told, ranks)
    assert ended[rank] == -signal.SIGKILL, said
    for one, status in enumerate(ended):
        is_named = re.search(r"ranks? \d", said[one]) is not None
        assert status == 0 or one == rank or is_named or OF_TORCH in said[one], (rank, moment, said)
    newest = require_nothing_lost(folder)
    assert newest >= 2, said
    ended, told = run(train, folder, ranks)
    said = printed(told, ranks)
    assert ended == [0] * ranks, said
    assert results(told, ranks, "digests") == expected, said
    hidden = folder / ".lifecycle"
    assert [one for name in ("staging", "parts") for one in (hidden / name).iterdir()] == []
    return True


def drawn(counts: list[dict[str, int]], draw: random.Random, stage: str) -> tuple[int, Moment]:
    """A rank, and a moment of it in a stage: each place is as likely as any, however often it is passed."""
    rank = draw.randrange(len(counts))
    place = draw.choice(sorted(one for one in counts[rank] if one.startswith(STAGES[stage])))
    number = draw.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP))
    return rank, (place, draw.randint(1, counts[rank][place]), number)


def main() -> None:
    """Kill, resume, compare; print how often."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--kills", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.update(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    draw, number, stages = random.Random(options.seed), itertools.count(), itertools.cycle(STAGES)
    for kind in options.kind:
        nowhere = dict.fromkeys(range(options.ranks))
        ended, told = run(KINDS[kind], options.folder / f"{kind}-whole", options.ranks, nowhere)
        assert not any(ended), printed(told, options.ranks)
        import_all(results(told, 1, "modules")[0])
        expected, counts = (results(told, options.ranks, key) for key in ("digests", "counts"))
        assert all(len(one) > 100 for one in counts)
        kills, stage = 0, next(stages)
        while kills < options.kills:
            rank, moment = drawn(counts, draw, stage)
            began, folder = time.monotonic(), options.folder / f"{kind}-{next(number)}"
            killed = kill_and_resume(kind, folder, options.ranks, expected, rank, moment)
            kills += killed
            stage = next(stages) if killed and kills < options.kills else stage
            how = moment[2].name if killed else "it ended before that"
            print(f"{kind} rank {rank} {moment[0]} {moment[1]}: {how}, {time.monotonic() - began:.1f} s")
        print(f"{kind}: {kills} kills of {options.ranks} ranks")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    main()
