"""On each rank: signals to one rank end the training of all at one step, saved, and it goes on exactly.

``torchrun ... -m tests.distributed.preemption FOLDER``. All cases but the last let ``train()`` return: one launch
is enough; in the last one the process ends by the signal.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.ranks import Ranks
from tests.trainer.runs import Rows, digests, new_trainer
from tests.trainer.test_preemption import Signalled

SETTINGS: dict[str, Any] = {
    "max_steps": 11,
    "save_steps": 6,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 7,
}
CASES: dict[str, tuple[tuple[str, int], int]] = {
    "step": (("step", 2), 0),  # where, and to which rank
    "step of the other rank": (("step", 4), 1),
    "evaluation": (("evaluation", 7), 1),
    "save": (("save", 6), 0),
    "last step": (("step", 10), 1),
}


def run(place: Path, callback: LifecycleCallback) -> dict[str, Any]:
    trainer = new_trainer(place, callback, kind=Signalled, train=Rows(32), **SETTINGS)
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    rows = [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]
    return {"digests": digests(trainer), "log": rows, "step": trainer.state.global_step}


def main() -> None:
    logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    whole = run(folder / "whole", LifecycleCallback())
    ranks, found = Ranks.current(), {}
    for name, (where, rank) in CASES.items():
        Signalled.where = where if rank == ranks.rank else ("", -1)
        Signalled.send = staticmethod(lambda: os.kill(os.getpid(), signal.SIGTERM))
        callback = LifecycleCallback(on_preempt="return")
        broken = run(folder / name, callback)
        saved = latest_checkpoint(folder / name)
        ranks.barrier(what="looking at what was saved")
        again = run(folder / name, LifecycleCallback())
        found[name] = {
            "by": callback.preempted,
            "ended at": broken["step"],
            "saved": Path(str(saved)).name,
            "differs": [key for key in whole if again[key] != whole[key]],
        }
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    Signalled.where = ("step", 2) if ranks.rank == 1 else ("", -1)
    run(folder / "killed", LifecycleCallback())


if __name__ == "__main__":
    main()
