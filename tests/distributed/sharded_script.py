"""What each rank runs: trainings and loops whose model is shared out, broken off and resumed; and a part that is lost.

Arguments: a folder for ``rank-N.json``, and names of cases (:mod:`sharded_cases`), all if there are none.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from hf_lifecycle import LifecycleError, TrainingStateManager
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.testing.attempts import forget_last_attempt
from tests.distributed.exactness import train
from tests.distributed.loop_cases import problems_of
from tests.distributed.sharded_cases import LOOPS, SHARDED, plugin
from tests.resume.cases.tiny import Regressor


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
                found[case.name] = train(case, folder / case.name)["differences"]
        for loop in LOOPS:
            if not names or loop.name in names:
                found[loop.name] = problems_of(loop, folder)
        if not names:
            found["lost"] = lost(folder / "lost")
    except Exception:  # noqa: BLE001 - it is told to the test
        found["error"] = [traceback.format_exc()]
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
