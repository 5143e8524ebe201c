"""A large state of the user's is of the moment of each save, while saves are written and training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback
from hf_lifecycle.checkpoint.directory.events import read_events
from hf_lifecycle.checkpoint.directory.store import checkpoints_in
from hf_lifecycle.checkpoint.files.additions import LOOP, TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from tests.accelerator.tiny import new_script
from tests.trainer.runs import new_trainer


class Large:
    """Half a megabyte, which every step changes."""

    def __init__(self) -> None:
        self.values = torch.zeros(1 << 17)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values, "small": self.values[:1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])


class Adds(TrainerCallback):
    """Changes it right before a save and right after one."""

    def __init__(self, large: Large) -> None:
        self.large = large

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.large.values.fill_(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.large.values.fill_(-1)


def saved(directory: Path, kind: str) -> dict[int, set[float]]:
    """What each checkpoint has, by step."""
    found = {}
    for step, path in checkpoints_in(directory):
        state = read_tree(rank_file(path, 0), kind=kind)["objects"]["large"]
        found[step] = set(state["values"].tolist()) | set(state["small"].tolist())
    return found


def written_later(directory: Path) -> int:
    return [event.event for event in read_events(directory)].count("snapshot")


def test_under_trainer(tmp_path: Path) -> None:
    large = Large()
    callback = LifecycleCallback(objects={"large": large})
    new_trainer(tmp_path, Adds(large), callback, max_steps=10).train()
    assert saved(tmp_path, TRAINER) == {step: {float(step)} for step in (2, 4, 6, 8, 10)}
    assert written_later(tmp_path) == 4


def test_in_a_loop(tmp_path: Path) -> None:
    large = Large()
    script = new_script(tmp_path, objects={"large": large})
    for _ in script.manager.epochs(2):
        for batch in script.manager.batches(script.loader):
            large.values.fill_(-1)  # while the last save is written
            script.train(batch)
            large.values.fill_(script.manager.progress.step)
            if script.manager.progress.step % 2 == 0:
                script.manager.save(wait=False)
    script.manager.close()
    assert saved(tmp_path, LOOP) == {step: {float(step)} for step in (2, 4, 6, 8, 10, 12)}
    assert written_later(tmp_path) == 5
