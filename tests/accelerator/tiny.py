"""A tiny loop for the tests of this folder: made afresh each time, with the global generators elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader

from hf_lifecycle import TrainingStateManager
from hf_lifecycle.state.fingerprint import leaf_digests, module_tensors, tensor_digest
from tests.resume.cases.tiny import Regressor, Rows
from tests.resume.harness import forget_last_attempt

__all__ = ["Counter", "Script", "new_script"]


class Counter:
    """An object with a state of its own."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: Any) -> None:
        self.count = state["count"]


@dataclass
class Script:
    """What a script has made."""

    accelerator: Accelerator
    manager: TrainingStateManager
    model: Any
    optimizer: Any
    loader: Any

    def train(self, batch: Any) -> None:
        """One batch."""
        with self.accelerator.accumulate(self.model):
            self.accelerator.backward(self.model(**batch)["loss"])
            self.optimizer.step()
            self.optimizer.zero_grad()

    def digests(self) -> dict[str, str]:
        """Every model tensor and optimizer value."""
        found = {name: tensor_digest(tensor) for name, tensor in module_tensors(self.model).items()}
        return found | leaf_digests(self.optimizer.state_dict(), "optimizer")

    def run(
        self,
        *,
        epochs: int = 2,
        save_at: Collection[int] = (),
        stop_at: int = 0,
        wait: bool = True,
        change: Callable[[Any], object] | None = None,
        change_at: int = 0,
    ) -> Script:
        """Train ``epochs``; save at these steps; leave both loops after the step ``stop_at``.

        ``change``: called with the model after the step ``change_at``.
        """
        for _ in self.manager.epochs(epochs):
            for batch in self.manager.batches(self.loader):
                self.train(batch)
                if change is not None and self.manager.progress.step == change_at:
                    change(self.model)
                if self.accelerator.sync_gradients and self.manager.progress.step in save_at:
                    self.manager.save(wait=wait)
                if self.manager.progress.step == stop_at:
                    return self
        return self


def new_script(
    directory: Path | None,
    *,
    batch_size: int = 4,
    steps: int = 1,
    norm: bool = False,
    generators: int | None = None,
    optimizer_of: Callable[[Any], torch.optim.Optimizer] = lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    **settings: Any,
) -> Script:
    """Six batches of 4 rows an epoch; ``settings`` are the manager's, ``steps`` of accumulation the accelerator's.

    ``generators``: what they are seeded with; by default they are elsewhere each time. ``optimizer_of``: makes the
    optimizer of the model.
    """
    forget_last_attempt()
    if generators is not None:
        set_seed(generators)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps)
    manager = TrainingStateManager(accelerator, directory, **settings)
    model = Regressor(norm=norm)
    optimizer = optimizer_of(model)
    loader = DataLoader(Rows(), batch_size=batch_size, shuffle=True)
    return Script(accelerator, manager, *accelerator.prepare(model, optimizer, loader))
