"""What each rank runs: trainings and loops whose model is shared out, broken off and resumed; and a part that is lost.

Arguments: a folder for ``rank-N.json``, and names of cases (:mod:`sharded_cases`), all if there are none.
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
from hf_lifecycle.checkpoint.events import read_events
from hf_lifecycle.checkpoint.store import checkpoints_in
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.testing.attempts import forget_last_attempt
from tests.distributed.exactness import train
from tests.distributed.loop_cases import problems_of
from tests.distributed.sharded_cases import LOOPS, SHARDED, plugin, sharded
from tests.resume.cases.tiny import Regressor
from tests.resume.harness import Attempt


def lost(folder: Path) -> list[str]:
    """A weight of rank 1's part is another after accelerate has loaded it: what each rank says of it."""
    forget_last_attempt()
    accelerator = Accelerator(cpu=True, **plugin("SHARDED_STATE_DICT")())
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


def full(folder: Path) -> list[Any]:
    """Rank 1 cannot write its part of the second save, over which training goes on: what there is in the end."""
    forget_last_attempt()
    own, written = FileSystemWriter.write_data, []

    def write_data(self: Any, *given: Any, **named: Any) -> Any:
        written.append(self)
        if dist.get_rank() == 1 and len(written) == 3:  # a save is of a model and of an optimizer
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "__1_0.distcp")
        return own(self, *given, **named)

    FileSystemWriter.write_data = write_data
    try:
        run = Attempt(folder, "callback")
        trainer = sharded(run, "SHARDED_STATE_DICT", callbacks=run.callbacks(on_save_failure="continue"))
        trainer.train()
    finally:
        FileSystemWriter.write_data = own
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
        for case in SHARDED:
            if not names or case.name in names:
                differences = train(case, folder / case.name)["differences"]
                # The recorder counts a step's batches from a resume on; this one is in the middle of a step.
                own = () if case.name != "fsdp_trainer" else ("batches: ",)
                found[case.name] = [one for one in differences if not one.startswith(own)]
        for loop in LOOPS:
            if not names or loop.name in names:
                found[loop.name] = problems_of(loop, folder)
        if not names:
            found["full"] = full(folder / "full")
            found["lost"] = lost(folder / "lost")
    except Exception:  # noqa: BLE001 - it is told to the test
        found["error"] = [traceback.format_exc()]
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
