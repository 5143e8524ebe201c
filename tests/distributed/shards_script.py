"""What each rank runs: saves of sharded models in the background, each beside the host's own save of the same state.

Arguments: a folder for ``rank-N.json``, and names of what is to be run; if there are none, all of it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import save_fsdp_model, save_fsdp_optimizer, set_seed
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_lifecycle import LifecycleCallback, LifecycleError, TrainingStateManager
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.errors import NotEnoughSpace
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files import direct
from hf_lifecycle.saving.sharded.layout import ShardFile
from hf_lifecycle.saving.snapshots import async_capture
from hf_lifecycle.state.fingerprint import leaf_digests
from hf_lifecycle.testing.attempts import forget_last_attempt
from tests.distributed.sharded_cases import normed, plugin, sharded
from tests.listening import listening
from tests.resume.cases.tiny import Rows
from tests.resume.harness import Attempt

__all__ = ["NAME", "Loaded", "failing_write", "main", "prepared", "run_cases", "run_loop", "trained"]


NAME = "checkpoint-{}"  # a callback that names it itself would be waited for


class Beside(TrainerCallback):
    """Lets accelerate save the state that the last save was of, right before the next step."""

    def __init__(self, folder: Path, every: int = 2) -> None:
        self.folder = folder
        self.every = every
        self.trainer: Any = None
        self.at_step: dict[int, dict[str, str]] = {}  # the digests of what is trained

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and state.global_step % self.every == 0:
            place = self.folder / NAME.format(state.global_step)
            _write_beside(self.trainer.accelerator, place)
            self.trainer.save_model(str(place))  # of full state dicts alone it has files of its own
            self.at_step[state.global_step] = trained(kwargs["model"], kwargs["optimizer"])


def trainer(folder: Path, kind: str = "SHARDED_STATE_DICT") -> list[str]:
    """Trainer's saves, each of the first three with accelerate's beside it."""
    run = Attempt(folder / "out", "callback")
    beside = Beside(folder / "beside")
    one = sharded(run, kind, callbacks=[beside, *run.callbacks()], eval_strategy="no")
    beside.trainer = one
    one.train()
    loaded = Loaded()
    stock = sharded(
        Attempt(folder / "stock", "stock"), kind, callbacks=[loaded], eval_strategy="no", save_strategy="no"
    )
    stock.train(resume_from_checkpoint=str(folder / "out" / "checkpoint-6"))
    return [] if loaded.digests == beside.at_step[6] else ["stock Trainer loaded something else"]


class Loaded(TrainerCallback):
    """Sees what Trainer has loaded."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.digests = trained(kwargs["model"], kwargs["optimizer"])


def trained(model: Any, optimizer: Any) -> dict[str, str]:
    return leaf_digests(dict(model.named_parameters()), "model") | leaf_digests(optimizer.state_dict(), "optimizer")


def trainer_full(folder: Path) -> list[str]:
    """The same with full state dicts; Trainer has a file of its own with the model, too."""
    return trainer(folder, "FULL_STATE_DICT")


def _write_beside(accelerator: Any, place: Path) -> None:
    save_fsdp_model(accelerator.state.fsdp_plugin, accelerator, accelerator._models[0], str(place))
    optimizer, model = accelerator._optimizers[0], accelerator._models[0]
    save_fsdp_optimizer(accelerator.state.fsdp_plugin, accelerator, optimizer, model, str(place))


def prepared(
    model: Any, make: Callable[[Any], torch.optim.Optimizer], settings: Mapping[str, Any], rows: Any = None
) -> tuple[Any, Any, Any, Any]:
    """An accelerator with these arguments, and the model, an optimizer and a loader as it prepares them."""
    forget_last_attempt()
    set_seed(7)
    accelerator = Accelerator(**settings)
    loader = DataLoader(Rows() if rows is None else rows, batch_size=2, shuffle=True)
    return accelerator, *accelerator.prepare(model, make(model.parameters()), loader)


def run_loop(
    folder: Path,
    *,
    each_step: Callable[[int, Any, Any], None] = lambda step, model, optimizer: None,
    at_top: Callable[[int, Any], None] = lambda step, model: None,
    after_save: Callable[[int, Any, Any], None] = lambda step, model, accelerator: None,
    make: Callable[[Any], torch.optim.Optimizer] = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    kind: str = "SHARDED_STATE_DICT",
    settings: Callable[[], dict[str, Any]] | None = None,
    resumes: bool = False,
    prepare: Callable[[str], tuple[Any, Any, Any, Any]] | None = None,
) -> dict[str, str]:
    """8 steps, with a save that is not waited for after every second; what there is in the end, by name."""
    made = prepared(normed(), make, (settings or plugin(kind))()) if prepare is None else prepare(kind)
    accelerator, model, optimizer, loader = made
    manager = TrainingStateManager(accelerator, folder)
    try:
        if resumes:
            manager.resume()
        for _ in manager.epochs(4, max_steps=8):
            for batch in manager.batches(loader):
                at_top(manager.progress.step, model)
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                step = manager.progress.step
                each_step(step, model, optimizer)
                if step % 2 == 0:
                    manager.save(wait=False)
                    after_save(step, model, accelerator)
    finally:
        manager.close()
    return trained(model, optimizer)


def loop(folder: Path, kind: str = "SHARDED_STATE_DICT") -> list[str]:
    """A loop's saves, each with accelerate's beside it; a value of the optimizer takes ever more bytes."""

    def grow(step: int, model: Any, optimizer: Any) -> None:
        optimizer.param_groups[0]["note"] = "n" * 40 * step
        model.eval()
        with torch.no_grad():
            model(torch.zeros(4, 8))  # gathers the parameters, and leaves those of the root so
        model.train()

    def beside(step: int, model: Any, accelerator: Any) -> None:
        _write_beside(accelerator, folder / "beside" / f"checkpoint-{step}")

    run_loop(folder / "run", each_step=grow, after_save=beside, kind=kind)
    return []


def loop_full(folder: Path) -> list[str]:
    """The same with full state dicts."""
    return loop(folder, "FULL_STATE_DICT")


def other_plan(folder: Path) -> list[str]:
    """Momentum is set at step 4: torch makes a state of it before it saves, so that there is more to save."""

    def begin(step: int, model: Any, optimizer: Any) -> None:
        if step == 4:
            optimizer.param_groups[0]["momentum"] = 0.9

    def beside(step: int, model: Any, accelerator: Any) -> None:
        _write_beside(accelerator, folder / "beside" / f"checkpoint-{step}")

    run_loop(
        folder / "run",
        each_step=begin,
        after_save=beside,
        make=lambda parameters: torch.optim.SGD(parameters, lr=1e-2),
    )
    return []


def torn(folder: Path) -> list[str]:
    """Rank 1 changes its part of a weight after the save at step 4, before the next step."""

    own, is_changed = ShardFile.write, threading.Event()

    def write(*given: Any, **named: Any) -> list[int]:
        lengths = own(*given, **named)
        is_changed.wait(60)  # else the part may be complete before that
        return lengths

    def change(step: int, model: Any) -> None:
        if step == 4:
            if os.environ["RANK"] == "1":
                with torch.no_grad():
                    next(model.parameters()).add_(1.0)
            is_changed.set()

    ShardFile.write = write
    try:
        run_loop(folder / "run", at_top=change)
    finally:
        ShardFile.write = own
    return []


def no_room(folder: Path) -> list[str]:
    """Rank 1 has no memory for a snapshot."""
    own = async_capture.available_memory
    if os.environ["RANK"] == "1":
        async_capture.available_memory = lambda: 0
    try:
        run_loop(folder / "run")
    finally:
        async_capture.available_memory = own
    return []


def failing_write(own: Callable[..., None], at: int = 2) -> Callable[..., None]:
    """What writes a block, but for this one of rank 1, whose disk is full then."""
    written = []

    def write(descriptor: int, data: Any) -> None:
        written.append(descriptor)
        if dist.get_rank() == 1 and len(written) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(descriptor, data)

    return write


def full(folder: Path) -> list[str]:
    """Rank 1's disk is full while it writes its part of the save at step 4: what each rank is told."""
    own = direct.write_whole
    direct.write_whole = failing_write(own)
    try:
        run_loop(folder / "run")
    except LifecycleError as error:
        return [f"{type(error).__name__}: {error}"]
    finally:
        direct.write_whole = own
    return ["went on"]


def trainer_disk_full(folder: Path) -> list[str]:
    """Rank 0's disk has no room when the save at step 4 begins; Trainer trains on."""
    own, saves = RunDirectory.require_ready, []

    def require_ready(directory: RunDirectory) -> None:
        saves.append(directory)
        if len(saves) == 2:
            raise NotEnoughSpace(directory.path, 2, 1)
        own(directory)

    RunDirectory.require_ready = require_ready  # type: ignore[method-assign]
    try:
        continues = LifecycleCallback(on_save_failure="continue")
        sharded(Attempt(folder / "out", "callback"), "SHARDED_STATE_DICT", callbacks=[continues]).train()
    finally:
        RunDirectory.require_ready = own  # type: ignore[method-assign]
    return []


CASES: dict[str, Callable[[Path], list[str]]] = {
    "trainer": trainer,
    "trainer_full": trainer_full,
    "loop": loop,
    "loop_full": loop_full,
    "other_plan": other_plan,
    "torn": torn,
    "no_room": no_room,
    "full": full,
    "trainer_disk_full": trainer_disk_full,
}


def run_cases(cases: Mapping[str, Callable[[Path], list[Any]]], folder: Path, names: list[str]) -> None:
    """Run those of these names, or all, and write what was warned of in each, and what it gave."""
    torch.set_num_threads(1)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    found: dict[str, Any] = {}
    for name in names or cases:
        forget_last_attempt()
        with listening(logging.WARNING) as said:
            try:
                found[name] = [*cases[name](folder / name), *said]
            except Exception:  # noqa: BLE001 - it is told to the test
                found[name] = [*said, traceback.format_exc()]
    rank = Ranks.current().rank
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))
    Ranks.current().barrier(what="the end of the cases")
    dist.destroy_process_group()


def main(folder: Path, names: list[str]) -> None:
    """Run them on this rank."""
    run_cases(CASES, folder, names)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
