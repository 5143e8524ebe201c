"""What each rank runs: trainings and loops whose model is shared out, broken off and resumed; and a part that is lost.

Arguments: a folder for ``rank-N.json``, and names of cases (:mod:`sharded_cases`); if there are none, all of FSDP2.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.checkpoint import FileSystemWriter

from hf_lifecycle import LifecycleError, TrainingStateManager
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files import direct
from hf_lifecycle.testing.attempts import forget_last_attempt
from tests.distributed.exactness import train
from tests.distributed.loop_cases import problems_of
from tests.distributed.sharded_cases import ENGINE_LOOPS, ENGINES, LOOPS, SHARDED, plugin, sharded
from tests.resume.cases.tiny import Regressor
from tests.resume.harness import Attempt


def _is_the_recorders(name: str, difference: str) -> bool:
    """What differs in how a run is recorded, and not in what it is."""
    if name == "fsdp_trainer":  # a step's batches are counted from a resume on; this one is in the middle of a step
        return difference.startswith("batches: ")
    if name.startswith("zero_"):  # an object that is equal to itself alone; and Trainer counts by what is gathered
        return ("1 of " in difference and "loss_scaler)" in difference) or ": total_flos " in difference
    return False


def lost(folder: Path) -> list[str]:
    """A weight of rank 1's part is another after accelerate has loaded it: what each rank says of it."""
    forget_last_attempt()
    accelerator = Accelerator(**plugin("SHARDED_STATE_DICT")())
    accelerator.prepare(*_made())
    manager = TrainingStateManager(accelerator, folder)
    manager.save()

    def change(models: Any, input_dir: str) -> None:
        if accelerator.process_index == 1:
            with torch.no_grad():
                next(iter(accelerator._models[0].parameters())).to_local().add_(1.0)

    accelerator.register_load_state_pre_hook(change)
    try:
        manager.resume()
    except LifecycleError as error:
        return [type(error).__name__, str(error)]
    finally:
        manager.close()
    return ["resumed"]


def full(folder: Path, *, background: bool) -> list[Any]:
    """Rank 1 cannot write its part of the second save, over which training goes on: what there is in the end."""
    forget_last_attempt()
    owner, name, at = (direct, "write_whole", 1) if background else (FileSystemWriter, "write_data", 3)
    own, written = getattr(owner, name), []

    def write(*given: Any, **named: Any) -> Any:
        written.append(given)
        if dist.get_rank() == 1 and len(written) == at:  # a save is of a model and of an optimizer
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None if background else "__1_0.distcp")
        return own(*given, **named)

    setattr(owner, name, write)
    try:
        run = Attempt(folder, "callback")
        callbacks = run.callbacks(on_save_failure="continue", async_save=background)
        trainer = sharded(run, "SHARDED_STATE_DICT", callbacks=callbacks)
        trainer.train()
    finally:
        setattr(owner, name, own)
    failed = [event.facts["why"] for event in read_events(folder) if event.event == "failed"]
    return [[step for step, _ in checkpoints_in(folder)], failed]


def _made() -> tuple[Any, Any]:
    torch.manual_seed(7)
    model = Regressor()
    return model, torch.optim.AdamW(model.parameters())


def main(folder: Path, names: list[str]) -> None:
    """Run the cases and write what was found."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    try:
        for case in (*SHARDED, *(one for one in ENGINES if one.name in names)):
            if not names or case.name in names:
                differences = train(case, folder / case.name)["differences"]
                found[case.name] = [one for one in differences if not _is_the_recorders(case.name, one)]
        for loop in (*LOOPS, *(one for one in ENGINE_LOOPS if one.name in names)):
            if not names or loop.name in names:
                found[loop.name] = [one for one in problems_of(loop, folder) if not _is_the_recorders(loop.name, one)]
        if not names:
            found["full"] = [full(folder / f"full-{way}", background=way) for way in (False, True)]
            found["lost"] = lost(folder / "lost")
    except Exception:  # noqa: BLE001 - it is told to the test
        found["error"] = [traceback.format_exc()]
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
