"""The same tiny training under each host: 6 steps, 4 to an epoch, saved every 2 in the background."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import LifecycleCallback, TrainingStateManager, latest_checkpoint
from hf_lifecycle.hosts.trainer.saves.staging import Staging
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from tests.trainer.runs import Net, Rows, break_off, new_trainer

__all__ = ["HOSTS", "Host"]


class Host(NamedTuple):
    """One host.

    Attributes:
        train: Trains in a folder, from its newest checkpoint or anew, up to and with a step; then all that was begun is
            finished, as where a process ends. Settings are those that hosts have in common. Returns digests of what
            was trained.
        optimizer: Its file of the optimizer's state.
        generators: Its file of the random number generators.
    """

    train: Callable[..., dict[str, str]]
    optimizer: str
    generators: str


def _with_trainer(directory: Path, *, until: int = 6, **settings: Any) -> dict[str, str]:
    callback = LifecycleCallback(**settings)
    trainer, resumed = new_trainer(directory, callback), latest_checkpoint(directory, mirror=settings.get("mirror"))
    if until == 6:
        trainer.train(resume_from_checkpoint=resumed)
    else:
        break_off(trainer, step=until, resume=resumed)
        next(part for part in callback._parts if isinstance(part, Staging))._directory.close()
        callback._release(trainer.args)
    return digests(trainer.model, trainer.optimizer)


def _in_a_loop(directory: Path, *, until: int = 6, wait: bool = False, **settings: Any) -> dict[str, str]:
    set_seed(7)
    accelerator, model = Accelerator(cpu=True), Net()
    manager = TrainingStateManager(accelerator, directory, **settings)
    loader = DataLoader(Rows(), batch_size=4, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2), loader)
    try:
        manager.resume()
        for _ in manager.epochs(2, max_steps=6):
            for batch in manager.batches(loader):
                accelerator.backward(model(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
                if manager.progress.step % 2 == 0:
                    manager.save(wait=wait)
                if manager.progress.step == until < 6:
                    return digests(model, optimizer)
        return digests(model, optimizer)
    finally:
        manager.close()


def digests(model: torch.nn.Module, optimizer: Any) -> dict[str, str]:
    """Every model tensor and optimizer value, by name."""
    found = {name: tensor_digest(tensor) for name, tensor in module_tensors(model).items()}
    return found | leaf_digests(optimizer.state_dict(), "optimizer")


HOSTS = {
    "Trainer": Host(_with_trainer, "optimizer.pt", "rng_state.pth"),
    "loop": Host(_in_a_loop, "optimizer.bin", "random_states_0.pkl"),
}
