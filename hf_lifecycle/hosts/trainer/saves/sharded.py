"""Saves of a trainer whose model FSDP2 shards: each rank captures and writes its part, in accelerate's own layout.

As in :mod:`~hf_lifecycle.hosts.trainer.saves.whole`, the first save of a training is Trainer's own, and what all
others are laid out like. From then on Trainer's ``_save_checkpoint`` still runs on every rank, but of it
``_save_optimizer_and_scheduler``, which writes the folders of model and optimizer, does nothing. Which rank writes
what, ``torch.distributed.checkpoint`` has decided at the first save. Where a rank cannot go by that any more, all ranks
let Trainer save. With ``FULL_STATE_DICT``, ``save_model`` writes nothing either: rank 0's thread writes all files, and
the others leave their parts to it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hf_lifecycle.engine.background_saves import Learned
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.hosts.trainer.intercept import SAVE_MODEL, SAVE_OPTIMIZER
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredFiles, PartSaves
from hf_lifecycle.hosts.trainer.saves.small_files import Owned
from hf_lifecycle.hosts.trainer.saves.template import (
    ARGUMENTS,
    Observed,
    files_of_model,
    ingredients,
    observe,
    other_methods,
    overridden_writers,
)
from hf_lifecycle.hosts.trainer.saves.withheld import learned_rng_file, scheduler_file, step_follows, withheld
from hf_lifecycle.saving.captured import Provable
from hf_lifecycle.saving.files.checkpoint_files import Files, require_archive
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout, layout_by_name
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.saving.sharded.full import CapturedFull, FullTemplate, learn_full
from hf_lifecycle.saving.sharded.template import CapturedShards, ShardsPresent, ShardTemplate, learn_shards, present_of
from hf_lifecycle.saving.sharded.values import Live, Parts, Training
from hf_lifecycle.saving.snapshots.live import computed_state
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.proof import unwrapped

__all__ = ["ShardedSaves", "is_sharded", "obstacle_to_shards"]

# accelerate's names
_FOLDERS = "pytorch_model_fsdp_0", "optimizer_0"
_FILES = "pytorch_model_fsdp.bin", "optimizer.bin"
_SCHEDULER = "scheduler.pt"
_OF_TORCH = "torch.distributed."  # whose hooks gather and share out, and change nothing else


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP2 shards this trainer's model."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if hasattr(trainer, "accelerator") else None
    return getattr(plugin, "fsdp_version", 1) == 2


def _is_full(trainer: Any) -> bool:
    return str(trainer.accelerator.state.fsdp_plugin.state_dict_type).endswith("FULL_STATE_DICT")


def obstacle_to_shards(trainer: Any) -> str | None:
    """Why the saves of this trainer cannot be made elsewhere, if that is known before the first."""
    if (others := other_methods(trainer)) is not None:
        return others
    model = unwrapped(trainer.model)
    if getattr(model, "peft_config", None):
        return "Trainer saves only the adapter of a sharded model"
    if _is_full(trainer) and (own_writer := overridden_writers(model)) is not None:
        return own_writer
    return computed_state([model], _OF_TORCH)


@dataclass(frozen=True, slots=True)
class TrainerShards:
    """The files of a save.

    Attributes:
        shards: This rank's parts.
        has_scheduler: Whether this rank writes a ``scheduler.pt``.
        rng_file: As of :class:`~hf_lifecycle.hosts.trainer.saves.template.Template`.
        ingredients: What the parts rest on.
        beside: What the files of ``save_model`` beside the weights are made of, if it writes any.
        static: These files, as there; of ``layouts`` it has none.
        owned: As there.
        has_arguments: As there.
    """

    shards: ShardTemplate | FullTemplate
    has_scheduler: bool
    rng_file: str | None
    ingredients: Any
    beside: Any = None
    static: Mapping[str, bytes] = field(default_factory=dict)
    layouts: Mapping[str, SafetensorsLayout] = field(default_factory=dict)
    owned: Owned = field(default_factory=Owned)
    has_arguments: bool = False


@dataclass(slots=True, kw_only=True)
class DeferredShards(DeferredFiles):
    """One rank's part of a save that was captured.

    Attributes:
        shards: Its files.
        present: What they are made of.
    """

    shards: CapturedShards | CapturedFull
    present: ShardsPresent

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        changed = self.shards.write(files, self.snapshot, session.parts)
        self.write_model(files)
        self.write_small(files, session.folder, self.present.optimizers(self.snapshot)["optimizer"])
        return changed

    def complete(self, folder: Path, told: Sequence[Mapping[str, Any]]) -> None:
        self.shards.describe(folder, told)


class ShardedSaves(PartSaves[TrainerShards]):
    """As :class:`~hf_lifecycle.hosts.trainer.saves.deferred.PartSaves`, of a trainer whose model is sharded."""

    def __init__(
        self, directory: RunDirectory, trainer: Any, weights: Weights, files: Loadable, *, otherwise: str
    ) -> None:
        super().__init__(directory, trainer, weights, files, otherwise=otherwise)
        self._parts = Parts()
        self._present: ShardsPresent | None = None  # what there is to be captured
        self._is_full = _is_full(trainer)

    def _watched(self, save: Callable[[], object]) -> Callable[[], Learned[TrainerShards]]:
        seen = observe(self._trainer, save)
        if self._is_full:
            self._ranks.barrier(what="writing the model")  # which rank 0 does alone
        return lambda: self._learned(seen)

    def _trainings(self) -> list[Training]:
        return [Training(self._trainer.model, self._trainer.optimizer, *(_FILES if self._is_full else _FOLDERS))]

    def _look(self) -> str | None:
        obstacle = None
        if self.template is not None:
            obstacle = self._weights.obstacle() or computed_state([unwrapped(self._trainer.model)], _OF_TORCH)
        self._present, reason = self.looked(obstacle, self._look_again)
        return reason

    def _look_again(self, template: TrainerShards) -> ShardsPresent:
        present = present_of(template.shards.names, self._trainings(), self._parts)
        if self._beside(present) != template.beside:
            raise NotLearned("the configuration of the model or the tokenizer changed")
        return present

    def _beside(self, present: ShardsPresent) -> Any:
        """What files that ``save_model`` writes are made of, beside the weights."""
        (live,) = present.named().values()
        return ingredients(self._trainer, live) if self._is_full and self._trainer.args.should_save else None

    def _captured(self, state: TrainerState, save: Callable[[], object]) -> DeferredShards:
        template, trainer = self.template, self._trainer
        present, self._present = self._present, None
        assert template is not None
        assert present is not None
        (live,) = present.named().values()

        def make(*, snapshot: Snapshot, **moment: Any) -> DeferredShards:
            return DeferredShards(
                template=template,
                snapshot=snapshot,
                shards=template.shards.captured(present, self._parts),
                present=present,
                scheduler=scheduler_file(trainer) if template.has_scheduler else None,
                weights=self._weights.defer(live, snapshot.watch),
                files=self._loadable,
                has_state=trainer.args.should_save,
                **moment,
            )

        overlap = step_follows(trainer, state)
        captured = self.capture(state.global_step, self.began, present.tensors, make, overlap=overlap)
        methods = {SAVE_MODEL[0]: self._by_owners(template.owned)} if self._is_full else {}
        with withheld(trainer, template.rng_file, lambda: captured, **methods):
            save()
        return captured

    def _learned(self, seen: Observed) -> Learned[TrainerShards]:
        trainer, folder, is_main = self._trainer, seen.checkpoint, self._trainer.args.should_save
        if folder is None:
            raise NotLearned("Trainer's save wrote no optimizer")
        # The other ranks see what rank 0 writes meanwhile, too.
        written = seen.of_optimizer | (frozenset() if self._is_full else seen.of_model) if is_main else frozenset()
        known = (*(_FILES if self._is_full else _FOLDERS), _SCHEDULER)
        unknown = [name for name in written if name.partition("/")[0] not in known]
        if unknown:
            raise NotLearned(f"{', '.join(sorted(unknown))}: unknown file")
        shards: ShardTemplate | FullTemplate
        comparisons: Sequence[Provable]
        trainings = self._trainings()
        beside: dict[str, Any] = {}
        if self._is_full:
            shards, comparisons, present = learn_full(
                folder,
                self._ranks.rank,
                trainings,
                self._parts,
                ranks=self._ranks.world_size,
                layouts=functools.partial(self._layouts, folder),
            )
            if is_main:
                static, _ = files_of_model(seen)
                beside = {"static": static, "owned": seen.owned, "has_arguments": ARGUMENTS in seen.of_model}
        else:
            shards, comparisons, present = learn_shards(folder, self._ranks.rank, trainings, self._parts)
            elsewhere = {layout.file for layout in shards.layouts.values()} - seen.of_optimizer
            if elsewhere:
                raise NotLearned(f"{', '.join(sorted(elsewhere))}: not written by {SAVE_OPTIMIZER}")
        has_scheduler = is_main and _SCHEDULER in seen.of_optimizer
        if has_scheduler:
            require_archive(folder / _SCHEDULER, trainer.lr_scheduler.state_dict())
        rng_file = learned_rng_file(trainer, folder)
        template = TrainerShards(shards, has_scheduler, rng_file, shards.ingredients, self._beside(present), **beside)
        return Learned(template, comparisons, present.tensors, ())

    @staticmethod
    def _layouts(folder: Path, live: Live) -> dict[str, SafetensorsLayout]:
        """How the files of ``save_model`` with weights are made; on every rank, when they are written."""
        found = {path.name: layout_by_name(path, live) for path in sorted(folder.glob("*.safetensors"))}
        unlike = [name for name, layout in found.items() if layout is None]
        if unlike:
            raise NotLearned(f"{', '.join(unlike)}: it has other tensors than the model")
        return {name: layout for name, layout in found.items() if layout is not None}

    def forget(self) -> None:
        super().forget()
        self._present = None
        self._parts.clear()
