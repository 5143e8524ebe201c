"""What each rank runs: saves under DeepSpeed in the background, each beside the engine's own save of the same state.

Arguments: a folder for ``rank-N.json``, and names of what is to be run; if there are none, all of it.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_lifecycle import LifecycleError, latest_checkpoint
from hf_lifecycle.checkpoint.directory import store
from hf_lifecycle.engine import save_session
from hf_lifecycle.engine.rank_parts import RankParts
from hf_lifecycle.hosts.accelerate.intercept import forget_singletons
from hf_lifecycle.hosts.trainer.saves.deepspeed import DeferredEngine
from hf_lifecycle.saving.files import direct
from tests.distributed.sharded_cases import engine, engine_plugin, normed
from tests.distributed.shards_script import NAME, Loaded, failing_write, run_cases, run_loop, trained
from tests.resume.cases.tiny import Rows
from tests.resume.harness import Attempt

__all__ = ["main"]

_GATHERS = {"stage3_gather_16bit_weights_on_model_save": True}


class Beside(TrainerCallback):
    """Lets Trainer save what the last save was of, right before the next step, by its own methods."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.trainer: Any = None
        self.at_step: dict[int, dict[str, str]] = {}  # the digests of what is trained

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % 2 == 0:
            place = str(self.folder / NAME.format(state.global_step))
            self.at_step[state.global_step] = trained(kwargs["model"], kwargs["optimizer"])
            self.trainer.save_model(place)
            self.trainer._save_optimizer_and_scheduler(place)


def beside(folder: Path, stage: int, **settings: Any) -> list[str]:
    """Trainer's saves, each with its own beside it; then stock Trainer loads one of them."""
    run = Attempt(folder / "out", "callback")
    beside = Beside(folder / "beside")
    one = engine(run, stage, callbacks=[beside, *run.callbacks()], eval_strategy="no", **settings)
    beside.trainer = one
    one.train()
    loaded = Loaded()
    stock = Attempt(folder / "stock", "stock")
    other = engine(stock, stage, callbacks=[loaded], eval_strategy="no", save_strategy="no", **settings)
    other.train(resume_from_checkpoint=str(folder / "out" / NAME.format(6)))
    return [] if loaded.digests == beside.at_step[6] else ["stock Trainer loaded something else"]


def loop(folder: Path, stage: int) -> list[str]:
    """A loop's saves, each with the engine's own beside it; then DeepSpeed loads one of them."""
    at_step: dict[int, dict[str, str]] = {}

    def beside(step: int, model: Any, accelerator: Any) -> None:
        at_step[step] = trained(model, accelerator._optimizers[0])
        model.save_checkpoint(str(folder / "beside" / NAME.format(step)), "pytorch_model")

    run_loop(folder / "run", after_save=beside, settings=engine_plugin(stage))
    forget_singletons()
    accelerator = Accelerator(**engine_plugin(stage)())
    model = normed()
    loader = DataLoader(Rows(), batch_size=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.load_checkpoint(str(folder / "run" / NAME.format(6)), "pytorch_model")
    return [] if trained(model, optimizer) == at_step[6] else ["DeepSpeed loaded something else"]


def other_writer(folder: Path) -> list[str]:
    """DeepSpeed's own writer of files is another than torch's."""
    run = Attempt(folder / "out", "callback")
    one = engine(run, 2, eval_strategy="no", config={"checkpoint": {"checkpoint_serialization": False}})
    one.train()
    return []


def torn(folder: Path) -> list[str]:
    """Rank 1 changes its part of the weights after the save at step 4, before the next step."""
    own, is_changed = DeferredEngine.write, threading.Event()

    def write(*given: Any, **named: Any) -> Any:
        told = own(*given, **named)
        is_changed.wait(60)  # else the part may be complete before that
        return told

    class Change(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                if dist.get_rank() == 1:
                    with torch.no_grad():
                        kwargs["optimizer"].optimizer.single_partition_of_fp32_groups[0].add_(1.0)
                is_changed.set()

    DeferredEngine.write = write
    try:
        run = Attempt(folder / "out", "callback")
        engine(run, 2, callbacks=[Change(), *run.callbacks()], eval_strategy="no").train()
    finally:
        DeferredEngine.write = own
    return []


def full(folder: Path) -> list[str]:
    """Rank 1's disk is full while it writes its part of the save at step 4: what each rank is told."""
    own = direct.write_whole
    direct.write_whole = failing_write(own, at=1)
    try:
        run = Attempt(folder / "out", "callback")
        engine(run, 2, callbacks=run.callbacks(), eval_strategy="no").train()
    except LifecycleError as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        direct.write_whole = own
    return ["went on"]


def killed(folder: Path, stage: int) -> list[str]:
    """A run that is resumed; one rank is killed in it where the environment says so. Digests of what it ends with."""
    name, rank, place = os.environ.get("KILL", "  ").split(" ")
    if (name, rank) == (folder.name, os.environ["RANK"]):
        owner: Any = {"write": DeferredEngine, "done": RankParts, "commit": store}[place]
        own, calls = getattr(owner, place), []
        last = 1 if place == "write" else 2  # the first save is Trainer's own

        def kill(*given: Any, **named: Any) -> Any:
            calls.append(place)
            if len(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return own(*given, **named)

        setattr(owner, place, kill)
        if owner is store:
            save_session.commit = kill
    run = Attempt(folder / "out", "callback")
    one = engine(run, stage, callbacks=run.callbacks(), eval_strategy="no")
    one.train(resume_from_checkpoint=latest_checkpoint(run.output_dir))
    return sorted(f"{name} {digest}" for name, digest in trained(one.model, one.optimizer).items())


CASES: dict[str, Callable[[Path], list[str]]] = {
    **{f"zero_{stage}": functools.partial(beside, stage=stage) for stage in (1, 2, 3)},
    "zero_3_gathered": functools.partial(beside, stage=3, zero=_GATHERS),
    "zero_2_offload": functools.partial(beside, stage=2, zero={"offload_optimizer": {"device": "cpu"}}),
    **{f"loop_{stage}": functools.partial(loop, stage=stage) for stage in (2, 3)},
    "other_writer": other_writer,
    "torn": torn,
    "full": full,
    "killed_2": functools.partial(killed, stage=2),
    "killed_3": functools.partial(killed, stage=3),
}


def main(folder: Path, names: list[str]) -> None:
    """Run them on this rank."""
    run_cases(CASES, folder, names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
