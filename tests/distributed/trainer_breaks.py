"""Breaks trainings of two ranks in every way, in processes forked from one that has imported everything.

Run: ``python -m tests.distributed.trainer_breaks FOLDER faults|exits|late|kills``. Prints one line of JSON:
what each rank was told, by scenario. Without a launcher, which would end the other ranks, one sees what they make of it
themselves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.checkpoint.directory.store import checkpoints_in, problems_of, staging_folder
from hf_lifecycle.engine import directory_access as directory
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.errors import NotEnoughSpace
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests.crash.kill_training import before_each_request
from tests.trainer.runs import Rows, break_off, digests, new_trainer
from tests.trainer.test_save_failures import files_of_at_most

RANKS = 2
Work = Callable[[int], Any]


def start(work: Work, answers: Path, *, timeout: float) -> list[int]:
    """Fork the ranks; each writes what ``work`` gives, or the error that it raises, to its file in ``answers``."""
    shutil.rmtree(answers, ignore_errors=True)
    answers.mkdir(parents=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(RANKS)}
            os.environ |= {"HF_LIFECYCLE_TIMEOUT": str(timeout)}
            began = time.monotonic()
            try:
                told = ["done", work(rank)]
            except BaseException as error:  # noqa: BLE001  it is what the test wants to see
                told = [type(error).__name__, str(error), "".join(traceback.format_exception(error))]
            told.append(time.monotonic() - began)
            (answers / f"{rank}.tmp").write_text(json.dumps(told))
            (answers / f"{rank}.tmp").rename(answers / f"{rank}.json")
            if rank == 0:  # it holds the store
                deadline = time.monotonic() + 2 * timeout + 10
                while not (answers / "1.json").exists() and time.monotonic() < deadline and _lives(answers, 1):
                    time.sleep(0.05)
            os._exit(0)
        (answers / f"{rank}.pid").write_text(str(child))
        children.append(child)
    return children


def _lives(answers: Path, rank: int) -> bool:
    pid = int((answers / f"{rank}.pid").read_text())
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z"


def finish(children: list[int], answers: Path) -> list[Any]:
    """Wait for the ranks; what each was told, None for one that ended without."""
    for child in children:
        os.waitpid(child, 0)
    files = [answers / f"{rank}.json" for rank in range(RANKS)]
    return [json.loads(file.read_text()) if file.exists() else None for file in files]


def together(work: Work, answers: Path, *, timeout: float = 60.0) -> list[Any]:
    return finish(start(work, answers, timeout=timeout), answers)


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if "checkpoint" in path.name)


def left(place: Path) -> dict[str, Any]:
    """What is in the output directory, and what is wrong with it."""
    staged = [path.name for path in staging_folder(place).iterdir()]
    problems = [problem for _, path in checkpoints_in(place) for problem in problems_of(path, full=True)]
    return {"names": names(place), "staged": staged, "problems": problems}


class RngFails(Trainer):
    """On rank 1, its own file cannot be written."""

    error: BaseException = OSError(28, "No space left on device", "rng_state_1.pth")

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4 and self.args.process_index == 1:
            raise self.error
        super()._save_rng_state(output_dir)


class RngFailsOtherwise(RngFails):
    error = ValueError("not a matter of writing")


class RngInterrupted(RngFails):
    error = KeyboardInterrupt()


class CommitInterrupted(Trainer):
    """On rank 0, amid the save of step 4, by a signal's handler; rank 1 writes its file after that."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == 4 and self.args.process_index == 1:
            time.sleep(1)
        super()._save_rng_state(output_dir)
        if self.state.global_step == 4 and self.args.process_index == 0:
            raise SystemExit(3)


class OptimizerFails(Trainer):
    """On rank 0, where torch does not say which file it was."""

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        limit = 500 if self.state.global_step == 4 else -1
        with files_of_at_most(limit):
            super()._save_optimizer_and_scheduler(output_dir)


class ManifestFails(Trainer):
    """On rank 0, in the commit."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self.state.global_step == 4 and self.args.process_index == 0:
            (Path(output_dir) / "lifecycle" / "manifest.json").mkdir(parents=True)


class ManifestFailsLate(ManifestFails):
    """And rank 0 takes its time in the first save, so that rank 1 writes its file while rank 0 looks at its own."""

    def create_optimizer(self, *given: Any, **named: Any) -> Any:
        optimizer = super().create_optimizer(*given, **named)
        if self.args.process_index == 0:
            optimizer.register_state_dict_pre_hook(lambda _: time.sleep(0.3 if self.state.global_step == 2 else 0))
        return optimizer


class ManifestFailsLateAndNoRoom(ManifestFailsLate):
    """And on rank 0 the disk has no room when the save after that begins, which hears of the failure."""

    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        own = RunDirectory.require_ready

        def require_ready(directory: RunDirectory) -> None:
            if self.state.global_step == 6 and directory.ranks.is_main:
                raise NotEnoughSpace(str(directory.path), 2, 1)
            own(directory)

        RunDirectory.require_ready = require_ready  # type: ignore[method-assign]
        try:
            super()._save_checkpoint(*given, **named)
        finally:
            RunDirectory.require_ready = own  # type: ignore[method-assign]


class Object:
    """State that one rank cannot give at step 4."""

    def __init__(self, rank: int) -> None:
        self.saves = 0
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.saves == 2 and self.rank == 1:
            raise OSError(5, "Input/output error", "object.bin")
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


BEST = {"eval_strategy": "steps", "eval_steps": 2, "label_names": ["labels"], "metric_for_best_model": "loss"}


def run(place: Path, *, kind: type[Trainer] = Trainer, resume: Any = None, callback: Any = None, **more: Any) -> Any:
    trainer = new_trainer(place, callback or LifecycleCallback(), kind=kind, train=Rows(40), **more)
    trainer.train(resume_from_checkpoint=resume)
    return digests(trainer)


def faults(folder: Path) -> dict[str, Any]:
    """Errors on one rank: each is told to both."""
    told = {}

    def tell(name: str, work: Callable[[Path, int], Any]) -> None:
        place = folder / name.replace(" ", "-")
        ranks = together(lambda rank: work(place, rank), folder / "answers")
        told[name] = {"ranks": ranks, "left": left(place) if place.exists() else None}

    tell("rng", lambda place, rank: run(place, kind=RngFails, **BEST))
    tell("optimizer", lambda place, rank: run(place, kind=OptimizerFails))
    tell("manifest", lambda place, rank: run(place, kind=ManifestFails, callback=LifecycleCallback(async_save=False)))
    tell("manifest later", lambda place, rank: run(place, kind=ManifestFailsLate))
    tell("object", lambda place, rank: run(place, callback=LifecycleCallback(objects={"own": Object(rank)})))
    goes_on = {"on_save_failure": "continue"}
    tell("continued", lambda place, rank: run(place, kind=RngFails, callback=LifecycleCallback(**goes_on), **BEST))
    tell("continued commit", lambda place, rank: run(place, kind=ManifestFails, callback=LifecycleCallback(**goes_on)))
    tell(
        "continued later",
        lambda place, rank: run(place, kind=ManifestFailsLate, callback=LifecycleCallback(**goes_on)),
    )
    tell(
        "continued twice",
        lambda place, rank: run(
            place, kind=ManifestFailsLateAndNoRoom, max_steps=8, callback=LifecycleCallback(**goes_on), **BEST
        ),
    )
    tell("not writing", lambda place, rank: run(place, kind=RngFailsOtherwise, callback=LifecycleCallback(**goes_on)))
    tell("interrupted", lambda place, rank: run(place, kind=RngInterrupted, **BEST))
    tell(
        "interrupted, to continue",
        lambda place, rank: run(place, kind=RngInterrupted, callback=LifecycleCallback(**goes_on)),
    )
    tell("ended", lambda place, rank: run(place, kind=CommitInterrupted, callback=LifecycleCallback(**goes_on)))
    tell("torn", lambda place, rank: torn(place))
    tell("other paths", lambda place, rank: run(place.with_name(f"place-{rank}")))
    tell("other directory", lambda place, rank: another_directory(place, rank))
    tell("other origins", lambda place, rank: other_origins(place, rank))
    tell("newest", lambda place, rank: newest(place, rank))
    return told


class Touches(TrainerCallback):
    """Writes to a parameter what it has, after the save of step 6 and before the next step."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 6:
            with torch.no_grad():
                next(kwargs["model"].parameters()).mul_(1.0)


def torn(place: Path) -> Any:
    """A snapshot of rank 0's is torn: the next step is saved in its place, on both."""
    wait = Snapshot.wait

    def slowly(snapshot: Snapshot) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        wait(snapshot)

    Snapshot.wait = slowly  # type: ignore[method-assign]
    trainer = new_trainer(place, Touches(), LifecycleCallback(), train=Rows(40), max_steps=8)
    trainer.train()
    return digests(trainer)


def another_directory(place: Path, rank: int) -> Any:
    """Rank 1's disk is another, under the same path."""
    if rank == 1:
        real = directory.working_folder
        directory.working_folder = lambda folder, name: real(folder.with_name("elsewhere"), name)
        directory._SIGHT = 0.3
    return run(place)


def other_origins(place: Path, rank: int) -> Any:
    run(place)
    return run(place, resume=str(place / f"checkpoint-{2 + 2 * rank}"), max_steps=8)


def newest(place: Path, rank: int) -> Any:
    """Rank 1 looks elsewhere, and is told what rank 0 found; an error too."""
    run(place)
    found = latest_checkpoint(place if rank == 0 else "/nowhere")
    Ranks.current().barrier(what="the test")
    for path in place.glob("checkpoint-*/model.safetensors") if rank == 0 else ():
        path.write_bytes(b"")
    try:
        latest_checkpoint(place)
    except Exception as error:  # noqa: BLE001
        return [found, type(error).__name__, str(error)]
    return found


def late(folder: Path) -> dict[str, Any]:
    """One rank, each in turn, comes late to every exchange of a run and of its resume: nothing comes of it."""

    def both(place: Path, *, is_late: bool) -> Any:
        own, count = Ranks._exchange, 0

        def exchange(self: Ranks, what: str, value: Any = None, failed: str | None = None) -> list[Any]:
            nonlocal count
            count += 1
            if is_late and count % RANKS == self.rank:
                time.sleep(0.1)
            return own(self, what, value, failed)

        Ranks._exchange = exchange
        break_off(new_trainer(place, LifecycleCallback(), train=Rows(40), **BEST), step=4)
        return [run(place, resume=latest_checkpoint(place), **BEST), count]

    told = {}
    for name, is_late in (("in time", False), ("late", True)):
        place = folder / name
        work = lambda rank, place=place, is_late=is_late: both(place, is_late=is_late)  # noqa: E731
        told[name] = {"ranks": together(work, folder / "answers", timeout=4.0), "left": left(place)}
    return told


def exits(folder: Path) -> dict[str, Any]:
    """At each exchange in turn one rank is gone: what the other says, and how long that took."""

    def works(place: Path, at: int, rank: int) -> Any:
        own, count, whats = Ranks._exchange, 0, []

        def exchange(self: Ranks, what: str, value: Any = None, failed: str | None = None) -> list[Any]:
            nonlocal count
            whats.append(what)
            (folder / f"what-{at}-{rank}").write_text(what)
            if count == at and rank == at % RANKS:
                os._exit(1)
            count += 1
            return own(self, what, value, failed)

        Ranks._exchange = exchange
        run(place, max_steps=2, **BEST)
        return count

    told: dict[str, Any] = {}
    total = together(lambda rank: works(folder / "whole", 10_000, rank), folder / "answers")[0][1]
    told["exchanges"] = total
    for first in range(0, total, 4):
        batch = {}
        for at in range(first, min(first + 4, total)):
            place, answers = folder / f"place-{at}", folder / f"answers-{at}"
            work = lambda rank, place=place, at=at: works(place, at, rank)  # noqa: E731
            batch[at] = start(work, answers, timeout=4.0), answers
        for at, (children, answers) in batch.items():
            ranks = finish(children, answers)
            survivor = 1 - at % RANKS
            told[str(at)] = {
                "what": (folder / f"what-{at}-{at % RANKS}").read_text(),
                "gone": at % RANKS,
                "said": ranks[survivor],
            }
    return told


def first_save(place: Path) -> None:
    """The run as it is after its first save."""
    break_off(new_trainer(place, LifecycleCallback(), train=Rows(40), save_total_limit=2), step=2)


def kills(folder: Path) -> dict[str, Any]:
    """SIGKILL before a file operation of a save, of one rank or of both; then the run goes on."""
    whole = together(lambda rank: run(folder / "whole", save_total_limit=2), folder / "answers")

    def resumed(place: Path) -> Any:
        return run(place, save_total_limit=2, resume=latest_checkpoint(place))

    def counted(place: Path) -> Any:
        requests: list[int] = []
        before_each_request(requests.append)
        return resumed(place), len(requests)

    place = folder / "counted"
    together(lambda rank: first_save(place), folder / "answers")
    unkilled = [one[1] for one in together(lambda rank: counted(place), folder / "answers")]
    told: dict[str, Any] = {"whole": [one[1] for one in whole], "counted": [digests for digests, _ in unkilled]}
    first, second = (requests for _, requests in unkilled)

    def dying(place: Path, rank: int, victims: tuple[int, ...], operation: int) -> Any:
        def kill(number: int) -> None:
            for victim in victims if number == operation else ():
                os.kill(int((folder / "answers" / f"{victim}.pid").read_text()), signal.SIGKILL)

        if rank == victims[-1]:
            before_each_request(kill)
        return resumed(place)

    # Anywhere in what rank 0 does, up to the last request of the last commit; rank 1 in writing its file; and both at
    # once, when rank 0 is about to make a request.
    of_first = [((0,), first * part // 4) for part in (1, 2, 3, 4)]
    of_second = [((1,), second // 2), ((1,), second)]
    for victims, operation in (*of_first, *of_second, ((1, 0), first * 2 // 3)):
        place = folder / f"killed-{'-'.join(map(str, victims))}-before-{operation}"
        together(lambda rank, place=place: first_save(place), folder / "answers")
        work = lambda rank, p=place, v=victims, o=operation: dying(p, rank, v, o)  # noqa: E731
        broken = together(work, folder / "answers", timeout=4.0)
        before = [step for step, path in checkpoints_in(place) if problems_of(path, full=True) == []]
        ended = together(lambda rank, place=place: resumed(place), folder / "answers")
        told[place.name] = {
            "victims": victims,
            "broken": broken,
            "committed": before,
            "ended": [one[1] if one is not None else None for one in ended],
            "said": [one[:2] for one in ended if one is None or one[0] != "done"],
            "left": left(place),
        }
    return told


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ["ACCELERATE_USE_CPU"] = "true"
    scenario = {"faults": faults, "exits": exits, "late": late, "kills": kills}[sys.argv[2]]
    print("TOLD " + json.dumps(scenario(Path(sys.argv[1]))))
