"""A script as a user has it: a loop on accelerate that saves every 2 steps. It can be told to kill itself.

Every save is waited for, unless ``NO_WAIT`` is set. Arguments: the run's directory, a folder for what each rank has to
say at the end, and, to be killed, a rank (or ``all``) and the number of the file operation in the run's directory at
which it dies.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from hf_lifecycle import EarlyStopping, TrainingStateManager
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from hf_lifecycle.state.rng.states import capture_rng
from tests.resume.cases.tiny import Regressor, Rows

STEPS = 10
EVENTS = frozenset({"open", "os.rename", "os.mkdir"})


def kill_at(operation: int, directory: Path, before: Callable[[], object] = lambda: None) -> None:
    """Let this process die by SIGKILL at a file operation in ``directory``, after ``before``."""
    numbers, within = itertools.count(1), str(directory)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in EVENTS or not str(arguments[0]).startswith(within):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        if next(numbers) == operation:
            before()
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main(directory: Path, answers: Path, on_world_size_change: Any = "error") -> None:
    """Train to the end, and write what this rank ended with."""
    set_seed(7)
    accumulation = int(os.environ.get("ACCUMULATION", "1"))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    early = EarlyStopping(patience=100)
    manager = TrainingStateManager(
        accelerator, directory, objects={"early": early}, keep_last=2, on_world_size_change=on_world_size_change
    )
    model = Regressor(norm=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(Rows(32), batch_size=4, shuffle=True)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1.0 + step))
    model, optimizer, scheduler, loader = accelerator.prepare(model, optimizer, scheduler, loader)
    rows: dict[int, list[float]] = {}
    resumed = manager.resume()
    for _ in manager.epochs(100, max_steps=int(os.environ.get("STEPS", STEPS))):
        for batch in manager.batches(loader):
            rows.setdefault(manager.progress.step, []).extend(batch["labels"].tolist())
            with accelerator.accumulate(model):
                loss = model(**batch)["loss"]
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            early.step(loss)
            if accelerator.sync_gradients and manager.progress.step % 2 == 0:
                manager.save(wait="NO_WAIT" not in os.environ)
    digests = {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}
    digests |= leaf_digests(optimizer.state_dict(), "optimizer") | leaf_digests(capture_rng().state_dict(), "rng")
    told = {
        "digests": digests,
        "resumed": str(resumed),
        "step": manager.progress.step,
        "early": early.state_dict(),
        "rate": optimizer.param_groups[0]["lr"],
        "rows": rows,
    }
    (answers / f"rank-{accelerator.process_index}.json").write_text(json.dumps(told))
    manager.close()


if __name__ == "__main__":
    directory, answers, *kill = sys.argv[1:]
    if kill and kill[0] in (os.environ["RANK"], "all"):
        kill_at(int(kill[1]), Path(directory))
    main(Path(directory), Path(answers), os.environ.get("ON_CHANGE", "error"))
