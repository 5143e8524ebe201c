"""What ``torchrun --max-restarts`` runs: a Trainer or a custom training loop, whose ranks kill themselves as planned.

Arguments: ``trainer`` or ``loop``; the directory of the run; a folder for what each rank has at its end; and the plan:
for each kill ``RANK:step:N`` (after its N-th optimizer step of this attempt) or ``RANK:file:N`` (before the N-th file
operation in the run's directory), separated by commas. A kill that happened is marked in the folder.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from torch.optim.optimizer import register_optimizer_step_post_hook

from tests.distributed import loop_script

RANK, ATTEMPT = int(os.environ.get("RANK", "0")), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def meet(folder: Path) -> None:
    """Begin together, with none of gloo's own keys of earlier attempts in the launcher's store.

    torch's group reads the addresses of dead processes there, as this package did, and now and then that costs an
    attempt. It is not what is tested. This package's keys stay.
    """
    world = int(os.environ["WORLD_SIZE"])
    (folder / f"here-{ATTEMPT}-{RANK}").touch()
    if RANK == 0:
        _wait_for([folder / f"here-{ATTEMPT}-{rank}" for rank in range(world)])
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=60))
        for key in store.list_keys():
            if key.startswith("default_pg/") and "hf_lifecycle" not in key:
                store.delete_key(key)
        (folder / f"go-{ATTEMPT}").touch()
    _wait_for([folder / f"go-{ATTEMPT}"])


def _wait_for(files: list[Path]) -> None:
    while not all(file.exists() for file in files):
        time.sleep(0.01)


def obey(plan: str, directory: Path, folder: Path) -> None:
    """Prepare the first kill of the plan that has not happened yet, if it is this rank's."""
    done = len(list(folder.glob("killed-*")))
    kills = [kill.split(":") for kill in plan.split(",") if kill]
    if done >= len(kills) or int(kills[done][0]) != RANK:
        return
    _, kind, number = kills[done]
    if kind == "file":
        loop_script.kill_at(int(number), directory, before=lambda: (folder / f"killed-{done}").touch())
        return
    steps = 0

    def after_step(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == int(number):
            (folder / f"killed-{done}").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    register_optimizer_step_post_hook(after_step)


def train(directory: Path, folder: Path) -> None:
    from hf_lifecycle import LifecycleCallback, latest_checkpoint
    from tests.trainer.runs import Rows, digests, new_trainer

    trainer = new_trainer(directory, LifecycleCallback(), train=Rows(160), max_steps=12, save_total_limit=2)
    trainer.train(resume_from_checkpoint=latest_checkpoint(directory))
    rows = [
        {key: value for key, value in row.items() if "per_second" not in key and "runtime" not in key}
        for row in trainer.state.log_history
    ]
    (folder / f"rank-{RANK}.json").write_text(json.dumps({"digests": digests(trainer), "rows": rows}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    kind, directory, folder, plan = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    meet(folder)
    obey(plan, directory, folder)
    if kind == "trainer":
        train(directory, folder)
    else:
        loop_script.main(directory, folder)
