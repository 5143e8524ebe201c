"""One save of a loop that is written in the background: what it consists of, and how it is written.

Promise: :meth:`DeferredSave.write` writes what ``accelerator.save_state`` would have written of models and optimizers
at the moment of the capture, and this rank's file, and reads nothing of the training that continues meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.engine.deferred_proof import DeferredProof
from hf_lifecycle.hosts.accelerate.saves.template import ModelFile, OptimizerState, Template
from hf_lifecycle.saving.captured import Captured
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.loadable import Loadable

__all__ = ["DeferredSave", "write_rank_file"]


@dataclass(slots=True, kw_only=True)
class DeferredSave(Captured):
    """A save that was captured.

    Attributes:
        optimizers: Their states, with tensors that lie where the live ones did.
        weights: The part of this rank's state that is completed from the snapshot.
        tree: The rest of it; ``tree["parts"]["weights"]`` is to come.
    """

    template: Template
    optimizers: list[OptimizerState]
    weights: DeferredProof
    tree: dict[str, Any]
    files: Loadable

    def write(self, folder: Path, blocks: Blocks) -> None:
        """Write into ``folder``, which has what accelerate wrote itself.

        Raises:
            OSError: A file could not be written.
        """
        files = Files(folder, blocks)
        for model in self.template.models:
            files.layout(model.name, model.layout, self._copies(model), self.snapshot.image(model.name))
        for optimizer in self.optimizers:
            archive = optimizer.archive(folder)
            files.archive(optimizer.file, archive, self.snapshot)
            self.files.look_at_archive(optimizer.file, archive)
        states = {one.name: self.snapshot.tree(one.tree) for one in self.optimizers}
        write_rank_file(folder, 0, self.tree, self.weights.tree(self.snapshot, states))
        self.known, self.size = files.known, files.size

    def _copies(self, model: ModelFile) -> Callable[[str], torch.Tensor]:
        return lambda name: self.snapshot.named(model.name_of(name))


def write_rank_file(folder: Path, rank: int, tree: dict[str, Any], weights: dict[str, Any]) -> None:
    """Write the file of a rank, whose state is ``tree`` with this part of the weights.

    Raises:
        OSError: It could not be written.
    """
    file = rank_file(folder, rank)
    file.parent.mkdir(exist_ok=True)
    write_tree(file, {**tree, "parts": {**tree["parts"], "weights": weights}}, kind=LOOP)
