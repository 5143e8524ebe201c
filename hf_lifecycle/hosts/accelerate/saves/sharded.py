"""Saves of a loop whose models FSDP2 shards: each rank captures and writes its part, in accelerate's own layout.

With ``FULL_STATE_DICT``, rank 0 writes the files, and the others leave their parts to it.

As in :mod:`~hf_lifecycle.hosts.accelerate.saves.background`, the first ``save(wait=False)`` is accelerate's own, and
what all others are laid out like; from then on ``accelerator.save_state`` runs with no models and no optimizers to
write, on every rank. Which rank writes what, ``torch.distributed.checkpoint`` has decided at the first save. Where a
rank cannot go by that any more, all ranks let accelerate save.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from accelerate.utils import OPTIMIZER_NAME, DistributedType
from accelerate.utils.other import TORCH_SAFE_GLOBALS

from hf_lifecycle.engine.background_saves import Learned, Template
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.engine.shared_saves import SharedSaves
from hf_lifecycle.hosts.accelerate.hooks import Hooks
from hf_lifecycle.hosts.accelerate.intercept import models_of, optimizers_of
from hf_lifecycle.hosts.accelerate.prepared import model_name, optimizer_name
from hf_lifecycle.hosts.accelerate.saves.background import DeferredRank
from hf_lifecycle.hosts.accelerate.saves.template import OTHERWISE, numbered, overridden_saves
from hf_lifecycle.saving.captured import WrittenSave
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.loadable import Loadable
from hf_lifecycle.saving.sharded.full import CapturedFull, FullTemplate, learn_full
from hf_lifecycle.saving.sharded.template import CapturedShards, ShardsPresent, ShardTemplate, learn_shards, present_of
from hf_lifecycle.saving.sharded.values import Parts, Training
from hf_lifecycle.saving.snapshots.live import computed_state
from hf_lifecycle.state.proof import unwrapped

__all__ = ["PartsBackground", "ShardedBackground", "is_sharded"]

_MODEL_NAME = "pytorch_model_fsdp"  # accelerate.utils.constants.FSDP_MODEL_NAME
_OF_TORCH = "torch.distributed."  # whose hooks gather and share out, and change nothing else
T = TypeVar("T", bound=Template)


def is_sharded(accelerator: Any) -> bool:
    """Whether FSDP2 shards the models of this accelerator."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return accelerator.distributed_type == DistributedType.FSDP and getattr(plugin, "fsdp_version", 1) == 2


class PartsBackground(SharedSaves[T], abc.ABC):
    """As :class:`~hf_lifecycle.hosts.accelerate.saves.background.Background`, where every rank writes a part.

    Args:
        accelerator: The loop's accelerator.
        directory: Is told of each save.
        hooks: Ours, and others'.

    Attributes:
        files: Tells of files that no resume will load.
    """

    def __init__(self, accelerator: Any, directory: RunDirectory, hooks: Hooks) -> None:
        super().__init__(directory, host="accelerate", otherwise=OTHERWISE)
        self._accelerator = accelerator
        self._hooks = hooks
        self.files = Loadable("accelerate", TORCH_SAFE_GLOBALS)

    @property
    def is_made_here(self) -> bool:
        """Whether this rank takes part in saves in the background."""
        return not self.is_left_by_all

    @abc.abstractmethod
    def _look(self, folder: Path) -> Learned[T]:
        """Look at what accelerate has just written."""

    @abc.abstractmethod
    def _obstacle_to_files(self) -> str | None: ...

    def _obstacle(self) -> str | None:
        return overridden_saves(self._accelerator) or self._hooks.obstacle() or self._obstacle_to_files()

    def learn_from(self, session: SaveSession) -> WrittenSave | None:
        """Learn from what accelerate has just written. Returns what is to be proved of it, if it is a template."""
        if self.is_left_by_all:
            return None
        reason = self._obstacle()
        if reason is not None:
            self.leave_to_host(reason)
        self.learn(session.step, session.began, lambda: self._look(session.folder))
        return self.written


@dataclass(slots=True, kw_only=True)
class DeferredShards(DeferredRank):
    """One rank's part of a save that was captured.

    Attributes:
        shards: Its files.
        present: What they are made of.
    """

    shards: CapturedShards | CapturedFull
    present: ShardsPresent

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        changed = self.shards.write(files, self.snapshot, session.parts)
        self.write_rank_file(session.folder, self.present.optimizers(self.snapshot))
        return changed

    def complete(self, folder: Path, told: Sequence[Mapping[str, Any]]) -> None:
        self.shards.describe(folder, told)


class ShardedBackground(PartsBackground[ShardTemplate | FullTemplate]):
    """As :class:`PartsBackground`, where FSDP2 shards models."""

    def __init__(self, accelerator: Any, directory: RunDirectory, hooks: Hooks) -> None:
        super().__init__(accelerator, directory, hooks)
        self._parts = Parts()
        self._is_full = str(accelerator.state.fsdp_plugin.state_dict_type).endswith("FULL_STATE_DICT")

    def prepare(self) -> ShardsPresent | None:
        """What there is to be captured, where the save that is due can be on all ranks; else accelerate makes it."""
        self.begin()
        obstacle = None if self.template is None else self._obstacle()
        return self.present(obstacle, lambda template: present_of(template.names, self._trainings(), self._parts))

    def _obstacle_to_files(self) -> str | None:
        return computed_state(map(unwrapped, models_of(self._accelerator)), _OF_TORCH)

    def _trainings(self) -> list[Training]:
        optimizers = optimizers_of(self._accelerator)
        called = (lambda name, number: f"{numbered(name, number)}.bin") if self._is_full else "{}_{}".format
        return [
            Training(
                model,
                optimizers[number] if number < len(optimizers) else None,
                called(_MODEL_NAME, number),
                called(OPTIMIZER_NAME, number),
                f"{model_name(number)}.",
                optimizer_name(number),
            )
            for number, model in enumerate(models_of(self._accelerator))
        ]

    def _look(self, folder: Path) -> Learned[ShardTemplate | FullTemplate]:
        full = functools.partial(learn_full, ranks=self._ranks.world_size)
        learn: Any = full if self._is_full else learn_shards
        template, comparisons, present = learn(folder, self._ranks.rank, self._trainings(), self._parts)
        return Learned(template, comparisons, present.tensors, ())

    def captured(self, session: SaveSession, present: ShardsPresent, *, overlap: bool, **own: Any) -> DeferredShards:
        """As :meth:`~hf_lifecycle.hosts.accelerate.saves.background.Background.captured`."""
        assert self.template is not None
        template = self.template

        def make(**moment: Any) -> DeferredShards:
            shards, rank = template.captured(present, self._parts), self._ranks.rank
            return DeferredShards(shards=shards, present=present, rank=rank, **own, **moment)

        return self.capture(session.step, session.began, present.tensors, make, overlap=overlap)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._parts.clear()
