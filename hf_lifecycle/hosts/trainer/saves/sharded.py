"""Saves of a trainer whose model FSDP2 shards: each rank captures and writes its part, in accelerate's own layout.

As in :mod:`~hf_lifecycle.hosts.trainer.saves.whole`, the first save of a training is Trainer's own, and what all
others are laid out like. From then on Trainer's ``_save_checkpoint`` still runs on every rank, but of it
``_save_optimizer_and_scheduler``, which writes the folders of model and optimizer, does nothing. Which rank writes
what, ``torch.distributed.checkpoint`` has decided at the first save. Where a rank cannot go by that any more, all ranks
let Trainer save.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hf_lifecycle.engine.background_saves import Commit, Learned
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.engine.shared_saves import SharedSaves
from hf_lifecycle.hosts.trainer.intercept import LOAD_BEST, SAVE_OPTIMIZER
from hf_lifecycle.hosts.trainer.method_patching import overridden
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredFiles, RankState
from hf_lifecycle.hosts.trainer.saves.template import ITS_OWN, Observed, observe
from hf_lifecycle.hosts.trainer.saves.withheld import learned_rng_file, scheduler_file, step_follows, withheld
from hf_lifecycle.saving.files.checkpoint_files import Files, require_archive
from hf_lifecycle.saving.files.direct import Blocks
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.saving.sharded.template import CapturedShards, ShardsPresent, ShardTemplate, learn_shards
from hf_lifecycle.saving.sharded.values import Parts, Training
from hf_lifecycle.saving.snapshots.gc_pause import gc_paused
from hf_lifecycle.saving.snapshots.live import computed_state
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.proof import unwrapped

__all__ = ["DeferredShards", "ShardedSaves", "is_sharded", "obstacle_to_shards"]

_MODEL, _OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"  # accelerate's names
_SCHEDULER = "scheduler.pt"
_OF_TORCH = "torch.distributed."  # whose hooks gather and share out, and change nothing else


def is_sharded(trainer: Any) -> bool:
    """Whether this trainer's saves are accelerate's ``SHARDED_STATE_DICT`` of FSDP2."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if hasattr(trainer, "accelerator") else None
    kind = str(getattr(plugin, "state_dict_type", None))
    return getattr(plugin, "fsdp_version", 1) == 2 and kind.endswith("SHARDED_STATE_DICT")


def obstacle_to_shards(trainer: Any) -> str | None:
    """Why the saves of this trainer cannot be made elsewhere, if that is known before the first."""
    absent = [name for name in (*ITS_OWN, LOAD_BEST) if not hasattr(trainer, name)]
    if absent:
        return f"{type(trainer).__name__} has no {', '.join(absent)}"
    own = overridden(trainer, ITS_OWN)
    if own:
        return f"{type(trainer).__name__} overrides {', '.join(own)}"
    model = unwrapped(trainer.model)
    if getattr(model, "peft_config", None):
        return "Trainer saves only the adapter of a sharded model"
    return computed_state([model], _OF_TORCH)


@dataclass(frozen=True, slots=True)
class TrainerShards:
    """The files of a save.

    Attributes:
        shards: This rank's parts.
        has_scheduler: Whether this rank writes a ``scheduler.pt``.
        rng_file: As of :class:`~hf_lifecycle.hosts.trainer.saves.template.Template`.
    """

    shards: ShardTemplate
    has_scheduler: bool
    rng_file: str | None

    @property
    def ingredients(self) -> Any:
        """What the parts rest on."""
        return self.shards.ingredients


@dataclass(slots=True, kw_only=True)
class DeferredShards(DeferredFiles):
    """One rank's part of a save that was captured.

    Attributes:
        shards: Its files.
        present: What they are made of.
    """

    shards: CapturedShards
    present: ShardsPresent
    _files: Files | None = None

    def write(self, folder: Path, blocks: Blocks, state: TrainerState, rank: RankState) -> Mapping[str, Any]:
        """Write this rank's files into ``folder``. Returns what rank 0 has to know of them.

        Raises:
            OSError: One could not be written.
        """
        files = self._files = Files(folder, blocks)
        changed = self.shards.write(files, self.snapshot)
        self.write_small(files, folder, state, rank, self.present.optimizers(self.snapshot)["optimizer"])
        self.known, self.size = files.known, files.size
        return changed

    def complete(self, folder: Path, told: Sequence[Mapping[str, Any]]) -> None:
        """Write what tells of the parts of all ranks; on rank 0, when they are written."""
        assert self._files is not None
        self.shards.describe(folder, self._files, told)


class ShardedSaves(SharedSaves[TrainerShards]):
    """The background saves of one trainer whose model is sharded; on every rank.

    Args:
        directory: Is told of each save.
        trainer: The trainer.
        weights: Their part of the state, which is completed from the snapshot.
        files: Told of what is written.
        otherwise: What it means that Trainer saves, for the log.
    """

    def __init__(
        self, directory: RunDirectory, trainer: Any, weights: Weights, files: Loadable, *, otherwise: str
    ) -> None:
        super().__init__(directory, host="Trainer", otherwise=otherwise)
        self._trainer = trainer
        self._weights = weights
        self._loadable = files
        self._parts = Parts()

    def save(self, state: TrainerState, save: Callable[[], object]) -> DeferredShards | None:
        """Let Trainer save: itself, watched, or with this rank's part captured, which is given then."""
        began = time.monotonic()
        if self.is_left_by_all:
            save()
            return None
        with gc_paused():
            present = self._present()
            if present is not None:
                return self._capture(state, present, began, save)
        seen = observe(self._trainer, save)
        if not self.is_left_by_all:
            if not self.is_left_to_host:
                self.learn(state.global_step, began, lambda: self._look(seen))
            self.agree_on_template()
        return None

    def _trainings(self) -> list[Training]:
        return [Training(self._trainer.model, self._trainer.optimizer, _MODEL, _OPTIMIZER)]

    def _present(self) -> ShardsPresent | None:
        """What there is to be captured, if it can be on all ranks."""
        obstacle = None
        if self.template is not None:
            obstacle = self._weights.obstacle() or computed_state([unwrapped(self._trainer.model)], _OF_TORCH)
        return self.present(obstacle, lambda template: template.shards.present(self._trainings(), self._parts))

    def _capture(
        self, state: TrainerState, present: ShardsPresent, began: float, save: Callable[[], object]
    ) -> DeferredShards:
        template, trainer = self.template, self._trainer
        assert template is not None
        (live,) = present.named().values()

        def make(snapshot: Snapshot) -> DeferredShards:
            return DeferredShards(
                step=state.global_step,
                asked=began,
                snapshot=snapshot,
                shards=template.shards.captured(present, self._parts),
                present=present,
                scheduler=scheduler_file(trainer) if template.has_scheduler else None,
                weights=self._weights.defer(live, snapshot.watch),
                files=self._loadable,
                rng_file=template.rng_file,
                has_state=trainer.args.should_save,
            )

        captured = self.capture(state.global_step, present.tensors, make, overlap=step_follows(trainer, state))
        with withheld(trainer, template.rng_file, lambda: captured):
            save()
        return captured

    def start(
        self,
        save: DeferredShards,
        session: SaveSession,
        state: TrainerState,
        rank: RankState,
        commit: Commit,
        done: Callable[[int], object],
    ) -> None:
        """Let this rank's part be written, and the checkpoint be committed on rank 0, which is told its bytes."""
        folder = session.folder
        self.share_out(
            save,
            session,
            lambda blocks: save.write(folder, blocks, state, rank),
            lambda told: save.complete(folder, told),
            commit,
            done,
        )

    def _look(self, seen: Observed) -> Learned[TrainerShards]:
        trainer, folder = self._trainer, seen.checkpoint
        if folder is None:
            raise NotLearned("Trainer's save wrote no optimizer")
        # The other ranks see what rank 0 writes meanwhile, too.
        written = seen.of_model | seen.of_optimizer if trainer.args.should_save else frozenset()
        unknown = [name for name in written if name.partition("/")[0] not in (_MODEL, _OPTIMIZER, _SCHEDULER)]
        if unknown:
            raise NotLearned(f"{', '.join(sorted(unknown))}: unknown file")
        shards, comparisons, present = learn_shards(folder, self._ranks.rank, self._trainings(), self._parts)
        elsewhere = {layout.file for layout in shards.layouts.values()} - seen.of_optimizer
        if elsewhere:
            raise NotLearned(f"{', '.join(sorted(elsewhere))}: not written by {SAVE_OPTIMIZER}")
        has_scheduler = trainer.args.should_save and _SCHEDULER in seen.of_optimizer
        if has_scheduler:
            require_archive(folder / _SCHEDULER, trainer.lr_scheduler.state_dict())
        template = TrainerShards(shards, has_scheduler, learned_rng_file(trainer, folder))
        return Learned(template, comparisons, present.tensors, ())

    def forget(self) -> None:
        """Training has ended: let go of the trainer."""
        self._trainer = self.template = None
        self._parts.clear()
