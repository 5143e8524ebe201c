"""On each rank: signals to one rank end the training of all at one step, saved, and it goes on exactly.

``torchrun ... -m tests.distributed.preemption FOLDER``. All cases but the last let ``train()`` or the loop return: one
launch is enough. In the last one the launcher gets SIGTERM, and passes it on to the process group of every rank.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_lifecycle import LifecycleCallback, latest_checkpoint
from hf_lifecycle.processes.ranks import Ranks
from tests.accelerator.test_loop_preemption import train
from tests.processes import to_group
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
    "step": (("step", 2), 0),  # where, and to which rank; "with workers": to its whole process group
    "step of the other rank": (("step", 4), 1),
    "evaluation": (("evaluation", 7), 1),
    "save": (("save", 6), 0),
    "last step": (("step", 10), 1),
    "evaluation with workers": (("evaluation", 7), 0),
}


def run(place: Path, callback: LifecycleCallback, workers: int = 0) -> dict[str, Any]:
    settings = {**SETTINGS, "dataloader_num_workers": workers}
    trainer = new_trainer(place, callback, kind=Signalled, train=Rows(32), **settings)
    trainer.train(resume_from_checkpoint=latest_checkpoint(place))
    rows = [
        {key: value for key, value in row.items() if not key.endswith(("_runtime", "_per_second"))}
        for row in trainer.state.log_history
    ]
    return {"digests": digests(trainer), "log": rows, "step": trainer.state.global_step}


def run_loop(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """A loop of one's own, of which rank 1 and its workers get a signal."""
    whole = train(folder / "whole")
    where = ("batch", 1) if ranks.rank == 1 else ("", -1)
    broken = train(folder / "run", where, workers=1, on_preempt="return")
    saved = latest_checkpoint(folder / "run")
    ranks.barrier(what="looking at what the loop saved")
    again = train(folder / "run")
    left = {
        "losses": whole["losses"][2 * broken["step"] :],
        "evaluations": whole["evaluations"][-len(again["evaluations"]) :],
    }
    expected = {**whole, **left}
    return {
        "by": broken["preempted"],
        "ended at": broken["step"],
        "saved": Path(str(saved)).name,
        "differs": [key for key in expected if again[key] != expected[key]],
    }


def run_limited(place: Path, ranks: Ranks, whole: dict[str, Any]) -> dict[str, Any]:
    """Rank 1 alone is near its limit after a slow step: two more as slow would not fit."""
    Signalled.where = ("step", 2) if ranks.rank == 1 else ("", -1)
    Signalled.send = staticmethod(lambda: time.sleep(3))
    callback = LifecycleCallback(time_limit=12 if ranks.rank == 1 else 10**6, on_preempt="return")
    broken = run(place, callback)
    saved = latest_checkpoint(place)
    ranks.barrier(what="looking at what was saved")
    again = run(place, LifecycleCallback(time_limit=10**6))
    return {
        "by": callback.preempted,
        "ended at": broken["step"],
        "saved": Path(str(saved)).name,
        "differs": [key for key in whole if again[key] != whole[key]],
    }


def main() -> None:
    logging.set_verbosity_error()
    folder = Path(sys.argv[1])
    whole = run(folder / "whole", LifecycleCallback())
    ranks, found = Ranks.current(), {}
    for name, (where, rank) in CASES.items():
        Signalled.where = where if rank == ranks.rank else ("", -1)
        workers = int("with workers" in name)
        send = to_group if workers else partial(os.kill, os.getpid())
        Signalled.send = staticmethod(partial(send, signal.SIGTERM))
        callback = LifecycleCallback(on_preempt="return")
        broken = run(folder / name, callback, workers)
        saved = latest_checkpoint(folder / name)
        ranks.barrier(what="looking at what was saved")
        again = run(folder / name, LifecycleCallback())
        found[name] = {
            "by": callback.preempted,
            "ended at": broken["step"],
            "saved": Path(str(saved)).name,
            "differs": [key for key in whole if again[key] != whole[key]],
        }
    found["time limit"] = run_limited(folder / "time limit", ranks, whole)
    found["loop"] = run_loop(folder / "loop", ranks)
    (folder / f"rank-{ranks.rank}.json").write_text(json.dumps(found))
    Signalled.where = ("step", 2) if ranks.rank == 1 else ("", -1)
    callback = LifecycleCallback()

    def through_launcher() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        end = callback._end
        while end is not None and end._watch is not None and end._watch.received is None:
            time.sleep(0.01)

    Signalled.send = staticmethod(through_launcher)
    run(folder / "killed", callback, workers=1)


if __name__ == "__main__":
    main()
