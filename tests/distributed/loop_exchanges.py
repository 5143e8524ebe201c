"""What each of two ranks runs: the same small loop over and over, with one rank failing at another exchange each time.

Rank 1 raises when it comes to an exchange; then one rank is interrupted while it waits there, each rank in turn.

Argument: a folder. Each rank writes ``rank-N.json`` there: the exchanges in their order, and for each what came of it.
"""

from __future__ import annotations

import errno
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_lifecycle import (
    EarlyStopping,
    RankFailed,
    RankUnreachable,
    ResumeMismatch,
    SaveFailed,
    TrainingStateManager,
    UnsupportedTraining,
)
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files import direct
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from tests.resume.cases.tiny import Regressor, Rows
from tests.resume.harness import forget_last_attempt

SECONDS = 1.5


def kind_of(what: str) -> str:
    return re.sub(r"\S*checkpoint-\d+", "a checkpoint", what)


class Failing(Ranks):
    """Ranks of which one fails when it comes to an exchange, or is interrupted while it waits there."""

    fails_at = ""
    interrupted_at = ""
    is_late = False

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.seen: list[str] = []

    def _exchange(self, what: str, value: Any = None, failed: str | None = None) -> list[Any]:
        kind = kind_of(what)
        if self.is_late and self._number % 2 == self.rank:
            time.sleep(0.1)
        if kind not in self.seen:
            self.seen.append(kind)
        if kind == self.fails_at:
            raise MemoryError(f"failed at {what}")
        return super()._exchange(what, value, failed)

    def _collect(self, number: int, what: str, told: str) -> dict[str, Any]:
        self._interrupt(what)
        return super()._collect(number, what, told)

    def _listen(self, number: int, what: str) -> dict[str, Any]:
        self._interrupt(what)
        return super()._listen(number, what)

    def _interrupt(self, what: str) -> None:
        if kind_of(what) == self.interrupted_at:
            self.interrupted_at = ""
            raise KeyboardInterrupt


def scenario(directory: Path) -> None:
    """Everything that exchanges: a start or a resume, batches, early stopping, saves that wait and that do not."""
    forget_last_attempt()
    accelerator = Accelerator(cpu=True)
    early = EarlyStopping(patience=1000)
    manager = TrainingStateManager(accelerator, directory, objects={"early": early}, keep_last=1)
    try:
        model = Regressor(norm=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), batch_size=4))
        manager.resume()
        before = manager.progress.step
        for _ in manager.epochs(1000, max_steps=before + 3):
            for batch in manager.batches(loader):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                early.step(1.0)
                if manager.progress.step < before + 3:
                    manager.save(wait=manager.progress.step == before + 1)
    finally:
        manager.close()


@contextmanager
def late_writing(is_late: bool) -> Iterator[None]:
    """Where asked for, torch begins to write, into a folder that is there, only when the other rank is done."""
    real = torch.save

    def later(*given: Any, **named: Any) -> None:
        time.sleep(0.4)
        real(*given, **named)

    torch.save = later if is_late else real
    try:
        yield
    finally:
        torch.save = real


def elsewhere(folder: Path) -> str:
    """Another directory on each rank."""
    forget_last_attempt()
    accelerator = Accelerator(cpu=True)
    try:
        TrainingStateManager(accelerator, folder / f"run-{accelerator.process_index}")
    except UnsupportedTraining as error:
        return str(error)
    return "no error"


class Broken:
    """An object whose state cannot be taken on rank 1."""

    def state_dict(self) -> dict[str, Any]:
        if dist.get_rank() == 1:
            raise OSError("no state here")
        return {}

    def load_state_dict(self, state: Any) -> None:
        pass


def broken_object(folder: Path) -> list[str]:
    """A save that fails on rank 1 alone. Returns the error's class and text, and what there is of a checkpoint."""
    forget_last_attempt()
    manager = TrainingStateManager(Accelerator(cpu=True), folder / "broken", objects={"broken": Broken()})
    try:
        manager.save()
    except (OSError, RankFailed, RankUnreachable) as error:
        return [
            type(error).__name__,
            str(error),
            *sorted(path.name for path in (folder / "broken").glob("checkpoint-*")),
        ]
    finally:
        manager.close()
    return ["no error"]


def in_background(folder: Path, torn: bool) -> list[str]:
    """Saves that are not waited for, of which the second is torn, or fails on rank 0. Returns what came of it."""
    forget_last_attempt()
    accelerator = Accelerator(cpu=True)
    manager = TrainingStateManager(accelerator, folder / f"torn-{torn}")
    model = Regressor()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), batch_size=4))
    wait, write = Snapshot.wait, direct.write_whole

    def slowly(snapshot: Snapshot) -> None:
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.5)
        wait(snapshot)

    def full(descriptor: int, data: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    Snapshot.wait = slowly  # type: ignore[method-assign]
    direct.write_whole = write if torn else full
    end = "no error"
    try:
        for batch in manager.batches(loader):
            accelerator.backward(model(**batch)["loss"])
            optimizer.step()
            if manager.progress.step < 3:
                manager.save(wait=False)
            if torn and manager.progress.step == 2:
                with torch.no_grad():
                    next(model.parameters()).mul_(1.0)
    except (SaveFailed, RankFailed) as error:
        end = f"{type(error).__name__}: {error}"
    finally:
        Snapshot.wait, direct.write_whole = wait, write  # type: ignore[method-assign]
        manager.close()
    Ranks.current().barrier(what="the end of a scenario")
    return [end, *sorted(path.name for path in (folder / f"torn-{torn}").glob("checkpoint-*"))]


def one_file(folder: Path) -> dict[str, Any]:
    """The single-file interface: what is drawn after a load is what was drawn after the save, on every rank."""
    forget_last_attempt()  # and with it, each rank's generators are elsewhere
    manager = TrainingStateManager(Accelerator(cpu=True))
    manager.save_state(folder / "state.safetensors", epoch=1, step=10)
    first = torch.rand(1).item()
    forget_last_attempt()
    manager.close()
    manager = TrainingStateManager(Accelerator(cpu=True))
    state = manager.load_state(folder / "state.safetensors")
    found = {"first": first, "again": torch.rand(1).item(), "step": state["step"]}
    alone = TrainingStateManager()
    try:
        alone.load_state(folder / "state.safetensors")
    except ResumeMismatch as error:
        found["alone"] = str(error)
    manager.close()
    return found


def ended(folder: Path, ranks: Ranks) -> list[Any]:
    """Run the scenario. Returns the error's class, text, ranks; seconds; whether all are at one exchange after it."""
    began = time.monotonic()
    end: list[Any] = ["no error", "", []]
    try:
        scenario(folder / "run")
    except RankUnreachable as error:
        end = ["RankUnreachable", str(error), list(error.ranks)]
    except RankFailed as error:
        end = ["RankFailed", str(error), list(error.causes)]
    except (MemoryError, KeyboardInterrupt) as error:
        end = [type(error).__name__, str(error), []]
    seconds = time.monotonic() - began
    try:
        try:
            ranks.barrier(what="after it")
        except RankFailed as error:  # interrupted at the last exchange: who was answered hears of it at the next
            if end[0] == "no error":
                end = ["RankFailed", str(error), list(error.causes)]
            ranks.barrier(what="after it")
    except (MemoryError, RankUnreachable):
        return [*end, seconds, False]
    return [*end, seconds, True]


def main(folder: Path) -> None:
    """Find the exchanges, then fail at each."""
    dist.init_process_group("gloo")
    rank, base = dist.get_rank(), dist.distributed_c10d._get_default_store()

    def fresh(fails_at: str = "", interrupted_at: str = "", who: int = 1) -> Failing:
        ranks = Failing(rank, dist.get_world_size(), base, timeout=SECONDS)
        if rank == who:
            ranks.fails_at, ranks.interrupted_at = fails_at, interrupted_at
        Ranks.current = classmethod(lambda cls: ranks)  # type: ignore[method-assign, assignment]
        return ranks

    starting = fresh()
    scenario(folder / "run")
    resuming = fresh()
    scenario(folder / "run")
    exchanges = list(dict.fromkeys([*starting.seen, *resuming.seen]))
    ranks = fresh()
    ranks.is_late = True
    late = ended(folder, ranks)
    outcome, interrupted = {}, {}
    for number, exchange in enumerate(exchanges):
        ranks = fresh(fails_at=exchange)
        outcome[exchange] = ended(folder, ranks)
        base.set(f"done {number} {rank}", "1")
        base.wait([f"done {number} {other}" for other in (0, 1)])
        # At the end of a commit rank 0 has answered already, and a collective of training's is next. So it has at the
        # end of a resume, and a meeting of these ranks is next, in which they hear of it.
        who = {"committing": 0, "resuming": 1}.get(exchange.partition(" ")[0], number % 2)
        # Rank 0 is interrupted when it has written its part, and rank 1 has not begun to.
        with late_writing(rank == 1 and exchange.startswith("saving")):
            interrupted[exchange] = [who, *ended(folder, fresh(interrupted_at=exchange, who=who))]
    fresh()
    told = {"exchanges": exchanges, "outcome": outcome, "interrupted": interrupted, "late": late}
    told |= {"elsewhere": elsewhere(folder), "broken": broken_object(folder)}
    told["torn"], told["full"] = in_background(folder, torn=True), in_background(folder, torn=False)
    told["file"] = one_file(folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    base.set(f"end {rank}", "1")
    base.wait([f"end {other}" for other in (0, 1)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
