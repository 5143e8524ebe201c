"""What each rank runs: a training with an object that is alike on all ranks and one that is not, and its resumption.

Argument: the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.processes.ranks import Ranks
from tests.trainer.runs import break_off, digests, new_trainer


class Average(TrainerCallback):
    """Half a megabyte that every step changes, by what ``share`` of the rank."""

    def __init__(self, share: float) -> None:
        self.values, self.share = torch.zeros(1 << 17), share

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.values += 1 + self.share * dist.get_rank()

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"].clone()


def trainer(folder: Path) -> tuple[Any, list[Average]]:
    averages = [Average(0.0), Average(0.5)]
    callback = LifecycleCallback(objects={"alike": averages[0], "own": averages[1]})
    return new_trainer(folder, *averages, callback, max_steps=8), averages


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    unbroken, of_unbroken = trainer(folder / "unbroken")
    unbroken.train()
    rank = dist.get_rank()
    files = [read_tree(rank_file(folder / "unbroken" / f"checkpoint-{step}", rank), kind=TRAINER) for step in (2, 6)]
    break_off(trainer(folder / "broken")[0], step=5)
    resumed, of_resumed = trainer(folder / "broken")
    resumed.train(resume_from_checkpoint=True)
    found = {
        "files": [[sorted(one["objects"]), one["shared"]] for one in files],
        "values": [[float(one.values[0]), float(one.values[-1])] for one in (*of_unbroken, *of_resumed)],
        "is_exact": digests(resumed) == digests(unbroken),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
