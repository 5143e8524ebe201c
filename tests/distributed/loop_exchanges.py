"""What each of two ranks runs: the same small loop over and over, with rank 1 failing at another exchange each time.

Argument: a folder. Each rank writes ``rank-N.json`` there: the exchanges in their order, and for each what came of it.
"""

from __future__ import annotations

import errno
import json
import re
import sys
import threading
import time
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
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.saving import direct
from hf_lifecycle.saving.snapshot import Snapshot
from tests.resume.cases.tiny import Regressor, Rows
from tests.resume.harness import forget_last_attempt

SECONDS = 1.5


class Failing(Ranks):
    """Ranks of which one fails when it comes to an exchange."""

    fails_at = ""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.seen: list[str] = []

    def gather(self, value: Any, *, what: str) -> list[Any]:
        kind = re.sub(r"\S*checkpoint-\d+", "a checkpoint", what)
        if kind not in self.seen:
            self.seen.append(kind)
        if kind == self.fails_at:
            raise MemoryError(f"failed at {what}")
        return super().gather(value, what=what)


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


def main(folder: Path) -> None:
    """Find the exchanges, then fail at each."""
    dist.init_process_group("gloo")
    rank, base = dist.get_rank(), dist.distributed_c10d._get_default_store()
    number = 0

    def fresh(fails_at: str) -> Failing:
        nonlocal number
        number += 1  # a store of its own: after a failure the ranks have counted differently
        ranks = Failing(rank, dist.get_world_size(), dist.PrefixStore(f"case {number}", base), timeout=SECONDS)
        ranks.fails_at = fails_at if rank == 1 else ""
        Ranks.current = classmethod(lambda cls: ranks)  # type: ignore[method-assign, assignment]
        return ranks

    starting = fresh("")
    scenario(folder / "run")
    resuming = fresh("")
    scenario(folder / "run")
    exchanges = list(dict.fromkeys([*starting.seen, *resuming.seen]))
    outcome: dict[str, Any] = {}
    for exchange in exchanges:
        fresh(exchange)
        began = time.monotonic()
        try:
            scenario(folder / "run")
            outcome[exchange] = ["no error", "", []]
        except RankUnreachable as error:
            outcome[exchange] = ["RankUnreachable", str(error), list(error.ranks)]
        except RankFailed as error:
            outcome[exchange] = ["RankFailed", str(error), list(error.causes)]
        except MemoryError as error:
            outcome[exchange] = ["MemoryError", str(error), []]
        outcome[exchange].append(time.monotonic() - began)
        base.set(f"done {number} {rank}", "1")
        base.wait([f"done {number} {other}" for other in (0, 1)])
    fresh("")
    told = {"exchanges": exchanges, "outcome": outcome, "elsewhere": elsewhere(folder), "broken": broken_object(folder)}
    told["torn"], told["full"] = in_background(folder, torn=True), in_background(folder, torn=False)
    told["file"] = one_file(folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))
    base.set(f"end {rank}", "1")
    base.wait([f"end {other}" for other in (0, 1)])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
