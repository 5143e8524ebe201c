"""Trainings on two nodes, each with a directory of its own: ``-m tests.distributed.nodes_script FOLDER PLAN``.

Node N writes to ``FOLDER/node-N``. ``PLAN`` is a JSON list of ``[host, run, what, settings]``, each done on all ranks:
``train`` in the directory ``run``, from the newest checkpoint there, to its end or, with ``until``, until it is
interrupted in that step; ``copy`` the directory ``of`` another run; ``delete`` or ``damage`` what ``names`` of a node,
or of a ``place``; ``transfer`` files.
Each rank writes to ``FOLDER/rank-N.json`` what came of each.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import resource
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import ProjectConfiguration, set_seed
from torch import nn
from torch.utils.data import DataLoader
from transformers.utils import logging as host_logging

from hf_lifecycle import LifecycleCallback, LifecycleError, TrainingStateManager, latest_checkpoint
from hf_lifecycle.checkpoint.files.regular import digest_file
from hf_lifecycle.processes import file_transfer
from hf_lifecycle.processes.file_transfer import FileTransfer
from hf_lifecycle.processes.nodes import Nodes
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.state.fingerprint import module_tensors, tensor_digest
from tests.listening import listening
from tests.trainer.runs import BrokenOff, Rows, break_off, digests, new_trainer

RANK, NODE = int(os.environ.get("RANK", "0")), int(os.environ.get("GROUP_RANK", "0"))
LEADS = os.environ.get("LOCAL_RANK", "0") == "0"


class Ema:
    """State of the user's that is alike on all ranks, so that rank 0 alone writes it."""

    def __init__(self) -> None:
        self.values = torch.arange(3.0)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


def train(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Trainer."""
    until, resume = settings.pop("until", None), settings.pop("resume", None)
    how = {"objects": {"ema": Ema()}, **settings.pop("callback", {})}
    settings = {"save_on_each_node": True, "gradient_accumulation_steps": 2, **settings}
    trainer = new_trainer(place, LifecycleCallback(**how), **settings)
    found = resume or latest_checkpoint(place, mirror=how.get("mirror"), save_on_each_node=True)
    if isinstance(found, str):
        found = found.replace("NODE", str(NODE))
    if until is None:
        trainer.train(resume_from_checkpoint=found)
    else:
        break_off(trainer, step=until, resume=found)
    return {"from": name_of(found), "digests": digests(trainer), "rows": trainer.state.log_history[:-1]}


def loop(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """A custom training loop."""
    set_seed(1)
    config = ProjectConfiguration(save_on_each_node=settings.get("save_on_each_node", True))
    accelerator = Accelerator(cpu=True, project_config=config)
    model: Any = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Rows(), 2, shuffle=True))
    manager = TrainingStateManager(
        accelerator, place, keep_last=settings.get("keep_last"), mirror=settings.get("mirror"), objects={"ema": Ema()}
    )
    try:
        named = settings.get("resume")
        found = manager.resume(named and place / named[NODE])
        for _ in manager.epochs(8, max_steps=6):
            for batch in manager.batches(loader):
                if manager.progress.step == settings.get("until"):
                    raise BrokenOff
                loss = nn.functional.mse_loss(model(batch["x"]).squeeze(-1), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                if manager.progress.step % 2 == 0:
                    manager.save(wait=settings.get("wait", True))
    except BrokenOff:
        found = None
    finally:
        manager.close()
    tensors = module_tensors(accelerator.unwrap_model(model))
    return {"from": name_of(found), "digests": {name: tensor_digest(one) for name, one in tensors.items()}}


def name_of(checkpoint: str | Path | None) -> str | None:
    return None if checkpoint is None else Path(checkpoint).name


def delete(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if settings["node"] == NODE and LEADS:
        for name in settings.get("names", ["."]):
            shutil.rmtree(place / name)
    return {}


def copy(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if LEADS:
        shutil.copytree(place.with_name(settings["of"]), place)
    return {}


def damage(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    if settings["node"] == NODE and LEADS:
        for name in settings["names"]:
            file = next((Path(settings.get("place", place)) / name).glob("*model*"), None)
            assert file is not None, sorted(place.rglob("*"))
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
    return {}


def transfer(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Send files of which one is not there, one is where it is to go to already, and one is too long for a disk."""
    ranks = Ranks.current()
    ranks.begin()
    nodes = Nodes.of(ranks, writes=True)
    sends = FileTransfer(ranks, nodes)
    place.mkdir(parents=True)
    sizes = {"folder/first": 2500, "gone": 1500, "empty": 0, "in the way": 2500, "too long": 2600, "last": 1000}
    for name, size in sizes.items():
        if name != "gone" and (NODE == 0 or name == "in the way"):
            (place / name).parent.mkdir(exist_ok=True)
            (place / name).write_bytes(bytes([NODE]) * size)
    error, limits = "", resource.getrlimit(resource.RLIMIT_FSIZE)
    if NODE == 1:
        # Less than a file's buffer: only when it is closed is it written.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2550, limits[1]))
    try:
        sends.send([(0, name, size) for name, size in sizes.items()], place, lambda _: True)
    except OSError as raised:
        error = str(raised)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return {"error": error, "here": {name: (place / name).exists() and digest_file(place / name) for name in sizes}}


def lose(place: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Send a file to a node that has closed its connections."""
    ranks = Ranks.current()
    ranks.begin()
    nodes = Nodes.of(ranks, writes=True)
    file_transfer._last = None  # so that connections are made
    before = set(os.listdir("/proc/self/fd"))
    sends = FileTransfer(ranks, nodes)
    place.mkdir(parents=True)
    (place / "file").write_bytes(bytes(2500))
    ranks.barrier(what="making a connection")
    if NODE == 1:
        for name in set(os.listdir("/proc/self/fd")) - before:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
                one.getpeername()  # not a listening one
                one.shutdown(socket.SHUT_RDWR)
    ranks.barrier(what="closing the connection")
    if NODE == 1:
        return {}
    sends.send([(0, "file", 2500)], place, lambda _: True)
    return {}


def kill_before_commit_of(name: str, other: Path) -> None:
    """Let this process be killed in the moment before its node commits, when the other node has."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "os.rename" and Path(os.fsdecode(given[1])).name == name:
            deadline = time.monotonic() + 120
            while not (other / name).is_dir() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def main(folder: Path, plan: list[Any], said: list[str]) -> None:
    logging.getLogger("hf_lifecycle").setLevel(logging.INFO)
    told: dict[str, Any] = {}
    work = {"train": {"loop": loop, "trainer": train}, "delete": delete, "damage": damage, "copy": copy}
    work |= {"transfer": transfer, "lose": lose}
    for host, run, what, settings in plan:
        said.clear()
        settings = dict(settings)
        AcceleratorState._reset_state()
        GradientState._reset_state()
        place = folder / ("shared" if settings.pop("shared", False) else f"node-{NODE}") / run
        if (kill := settings.pop("kill", None)) is not None and RANK == 1:
            kill_before_commit_of(kill, folder / "node-0" / run)
        do = work[what][host] if what == "train" else work[what]
        try:
            came = do(place, settings)
        except (LifecycleError, BrokenOff) as error:
            came = {"error": f"{type(error).__name__}: {error}"}
        if dist.is_initialized():
            dist.barrier()
        files = sorted(path.relative_to(place).as_posix() for path in place.glob("checkpoint-*/**/*") if path.is_file())
        names = sorted(path.name for path in place.glob("checkpoint-*"))
        if dist.is_initialized():
            dist.barrier()  # the next training may remove some of them
        told.setdefault(run, []).append({**came, "said": list(said), "names": names, "files": files})
    (folder / f"rank-{RANK}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    file_transfer._CHUNK = 1000  # so that files are several chunks
    host_logging.set_verbosity_error()
    with listening() as said:
        main(Path(sys.argv[1]), json.loads(sys.argv[2]), said)
    if dist.is_initialized():
        dist.destroy_process_group()
