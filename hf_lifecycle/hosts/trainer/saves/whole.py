"""Saves of a trainer whose model is whole on each rank: the first of them captures and writes.

The first save of a training is Trainer's own, and the template of all others. From then on Trainer's
``_save_checkpoint`` still runs, but of it ``save_model`` and ``_save_optimizer_and_scheduler`` only capture: small
state at once, tensors into a snapshot that is copied while the next forward and backward run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState

from hf_lifecycle.engine.background_saves import COSTS_THE_BACKGROUND, BackgroundSaves, Learned
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.hosts.trainer.intercept import SAVE_MODEL
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredFiles
from hf_lifecycle.hosts.trainer.saves.template import Template, ingredients, observe, template_of
from hf_lifecycle.hosts.trainer.saves.withheld import scheduler_file, step_follows, withheld
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.saving.snapshots.live import computed_state, live_tensors, model_tensors
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.saving.snapshots.state_copies import StateCopies
from hf_lifecycle.state.proof import unwrapped

__all__ = ["DeferredSave", "WholeSaves"]

_Live = Mapping[str, torch.Tensor]  # the model's tensors, by each of their names


@dataclass(slots=True, kw_only=True)
class DeferredSave(DeferredFiles):
    """A save that was captured.

    Attributes:
        optimizer: The optimizer's state with tensors that lie where the live ones did.
    """

    optimizer: Any

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        self.write_model(files)
        if self.template.has_optimizer:
            archive = TorchArchive(self.optimizer, "optimizer")
            files.archive("optimizer.pt", archive, self.snapshot)
            self.files.look_at_archive("optimizer.pt", archive)
        self.write_small(files, session.folder, self.snapshot.tree(self.optimizer))
        return {}


class WholeSaves(BackgroundSaves[Template]):
    """The background saves of trainers, one after the other; on the rank that writes.

    Args:
        otherwise: What it means that Trainer saves, for the log.
    """

    def __init__(self, directory: RunDirectory, weights: Weights, files: Loadable, *, otherwise: str) -> None:
        super().__init__(directory, host="Trainer", otherwise=otherwise)
        self.trainer: Any = None
        self._weights = weights
        self._loadable = files
        self._copies = StateCopies()

    def save(self, state: TrainerState, save: Callable[[], object]) -> DeferredSave | None:
        """Let Trainer save: itself, watched, or captured, which is given then."""
        obstacle = None if self.is_left_to_host else self._weights.obstacle()
        if obstacle is not None:
            self.leave_to_host(obstacle)
        if self.is_left_to_host:
            save()
            return None
        live = live_tensors(unwrapped(self.trainer.model))  # once a save: it goes through all modules
        if self.fits(ingredients(self.trainer, live)):
            return self._capture(state, live, save)
        began = time.monotonic()
        seen = observe(self.trainer, save)

        def look() -> Learned[Template]:
            template, comparisons = template_of(self.trainer, seen, at_once=self.at_once)
            optimizer, tensors = self._copies.of(self.trainer.optimizer.state_dict())
            every = [*model_tensors(live, template.names), *tensors]
            return Learned(template, comparisons, every, template.plans(live, optimizer))

        self.learn(state.global_step, began, look)
        return None

    def _capture(self, state: TrainerState, live: _Live, save: Callable[[], object]) -> DeferredSave | None:
        template, trainer, began = self.template, self.trainer, time.monotonic()
        assert template is not None
        obstacle = computed_state([unwrapped(trainer.model)]) or self.overlap.obstacle()
        if obstacle is not None:
            self.leave_to_host(obstacle)
            save()
            return None
        captured: DeferredSave | None = None

        def model_captured(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(output_dir: str, *given: Any, **named: Any) -> None:
                nonlocal captured
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                try:
                    template.owned.write(trainer, output_dir)
                    captured = self._captured(template, state, live, began)
                except (NotLearned, TypeError, *COSTS_THE_BACKGROUND) as error:
                    self.leave_to_host(f"{type(error).__name__}: {error}")
                    own(output_dir, *given, **named)

            return method

        with withheld(trainer, template.rng_file, lambda: captured, **{SAVE_MODEL[0]: model_captured}):
            save()
        return captured

    def _captured(self, template: Template, state: TrainerState, live: _Live, began: float) -> DeferredSave:
        trainer = self.trainer
        optimizer, tensors = self._copies.of(trainer.optimizer.state_dict())

        def make(*, snapshot: Snapshot, **moment: Any) -> DeferredSave:
            return DeferredSave(
                template=template,
                snapshot=snapshot,
                optimizer=optimizer,
                scheduler=scheduler_file(trainer) if template.has_scheduler else None,
                weights=self._weights.defer(live, snapshot.watch),
                files=self._loadable,
                **moment,
            )

        every = [*model_tensors(live, template.names), *tensors]
        return self.capture(state.global_step, began, every, make, overlap=step_follows(trainer, state))

    def forget(self) -> None:
        """Training has ended: let go of the trainer."""
        self.trainer = None
        self._copies.clear()
