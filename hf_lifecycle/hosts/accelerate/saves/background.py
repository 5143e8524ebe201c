"""Saves that a loop continues over: captured where ``save(wait=False)`` stands, and written by a thread.

The first of them is accelerate's own: it is the template, and a thread compares it with what it was made of, and
commits it. From then on ``accelerator.save_state`` still runs, with no models and no optimizers to write: so its small
files are accelerate's, of this very moment. Tensors go into a snapshot that is copied while the next forward and
backward run; every optimizer's step waits for it. Where a template cannot be had, every save waits, and one line says
why.

On rank 0 alone. Invariant: nothing here is an exchange with other ranks.
"""

from __future__ import annotations

import abc
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils.other import TORCH_SAFE_GLOBALS

from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.engine.background_saves import BackgroundSaves, Learned
from hf_lifecycle.engine.deferred_proof import Deferred, DeferredProof
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.hosts.accelerate.hooks import Hooks
from hf_lifecycle.hosts.accelerate.prepared import model_name
from hf_lifecycle.hosts.accelerate.saves.template import (
    OTHERWISE,
    Live,
    ModelFile,
    OptimizerState,
    Template,
    ingredients,
    live_models,
    obstacle_to,
    optimizer_states,
    template_of,
)
from hf_lifecycle.saving.captured import WrittenSave
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.saving.snapshots.gc_pause import gc_paused
from hf_lifecycle.saving.snapshots.placement import LiveTensor

__all__ = ["Background", "DeferredRank"]

logger = logging.getLogger("hf_lifecycle")


class Present(NamedTuple):
    """What a save finds."""

    models: list[Live]
    optimizers: list[OptimizerState]
    tensors: list[LiveTensor]

    def named(self) -> dict[str, Live]:
        """The tensors of each model, by what their names begin with."""
        return {f"{model_name(number)}.": one for number, one in enumerate(self.models)}


@dataclass(slots=True, kw_only=True)
class DeferredRank(Deferred, abc.ABC):
    """What every captured save of a loop has of this rank.

    Attributes:
        rank: This rank.
        weights: The part of its state that is completed from the snapshot.
        tree: The rest of it; ``tree["parts"]["weights"]`` is to come.
    """

    rank: int
    weights: DeferredProof
    tree: dict[str, Any]

    def write_rank_file(self, folder: Path, optimizers: Mapping[str, Any]) -> None:
        """Write the file of this rank, whose optimizers have these states in the snapshot."""
        file = rank_file(folder, self.rank)
        file.parent.mkdir(exist_ok=True)
        weights = self.weights.tree(self.snapshot, optimizers)
        write_tree(file, {**self.tree, "parts": {**self.tree["parts"], "weights": weights}}, kind=LOOP)


@dataclass(slots=True, kw_only=True)
class DeferredSave(DeferredRank):
    """A save that was captured.

    Attributes:
        optimizers: Their states, with tensors that lie where the live ones did.
    """

    template: Template
    optimizers: list[OptimizerState]
    files: Loadable

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        for model in self.template.models:
            files.layout(model.name, model.layout, self._copies(model), self.snapshot.image(model.name))
        for optimizer in self.optimizers:
            archive = optimizer.archive(session.folder)
            files.archive(optimizer.file, archive, self.snapshot)
            self.files.look_at_archive(optimizer.file, archive)
        self.write_rank_file(session.folder, {one.name: self.snapshot.tree(one.tree) for one in self.optimizers})
        return {}

    def _copies(self, model: ModelFile) -> Callable[[str], torch.Tensor]:
        return lambda name: self.snapshot.named(model.name_of(name))


class Background(BackgroundSaves[Template]):
    """Makes a loop's saves in the background, where that is proved to give what accelerate would have written.

    Attributes:
        files: Tells of files that no resume will load.
        is_made_here: Whether this rank takes part in saves in the background.
    """

    def __init__(self, accelerator: Any, directory: RunDirectory, hooks: Hooks) -> None:
        super().__init__(directory, host="accelerate", otherwise=OTHERWISE)
        self.is_made_here = directory.ranks.is_main
        self._accelerator = accelerator
        self._hooks = hooks
        self.files = Loadable("accelerate", TORCH_SAFE_GLOBALS)

    def prepare(self) -> Present | None:
        """What there is to be captured, where the save that is due can be; None where accelerate is to make it."""
        self.begin()
        if self.template is None:
            return None
        reason = self._obstacle() or self.overlap.obstacle()
        if reason is not None:
            self.leave_to_host(reason)
            return None
        models = live_models(self._accelerator)
        try:
            if not self.fits(ingredients(self._accelerator, models)):
                return None
            present = self._present(self.template, models)
        except NotLearned as error:
            self.leave_to_host(str(error))
            return None
        template = self.template
        no_room = self.overlap.make_room(present.tensors, lambda: template.plans(present.models, present.optimizers))
        if no_room is not None:
            self.leave_to_host(no_room)
            return None
        return present

    def _obstacle(self) -> str | None:
        if self._directory.nodes.several:
            return "save_on_each_node: the nodes commit each save together"
        return obstacle_to(self._accelerator) or self._hooks.obstacle()

    def _present(self, template: Template, models: list[Live]) -> Present:
        with gc_paused():
            optimizers = optimizer_states(self._accelerator)
            return Present(models, optimizers, template.tensors(models, optimizers))

    def learn_from(self, session: SaveSession) -> WrittenSave | None:
        """Learn from what accelerate has just written. Returns what is to be proved of it, if it is a template."""
        if self.is_left_to_host:
            return None
        reason = self._obstacle()
        if reason is not None:
            self.leave_to_host(reason)
            return None

        def look() -> Learned[Template]:
            template, comparisons = template_of(self._accelerator, session.folder, at_once=self.at_once)
            present = self._present(template, live_models(self._accelerator))
            plans = template.plans(present.models, present.optimizers)
            return Learned(template, comparisons, present.tensors, plans)

        self.learn(session.step, session.began, look)
        return self.written

    def captured(self, session: SaveSession, present: Present, *, overlap: bool, **own: Any) -> DeferredSave:
        """Capture a save at this moment.

        Args:
            overlap: Whether a loop of the manager's continues, so that the next step is waited for.
            own: What :class:`DeferredRank` has of this rank, by name. Nobody else has it.

        Returns:
            What is to be handed over.
        """
        assert self.template is not None
        make = functools.partial(
            DeferredSave, rank=0, template=self.template, optimizers=present.optimizers, files=self.files, **own
        )
        return self.capture(session.step, session.began, present.tensors, make, overlap=overlap)
