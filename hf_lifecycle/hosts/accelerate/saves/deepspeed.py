"""Saves of a loop that DeepSpeed trains: each rank captures what its engines hand to ``torch.save``, and writes it.

The first ``save(wait=False)`` is accelerate's own. From then on the engines save as accelerate lets them, with all
their collectives, but what they hand to ``torch.save`` is kept (:mod:`~hf_lifecycle.saving.sharded.archives`). And
``accelerator.save_state`` runs with no models and no optimizers to write.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import MODEL_NAME, DistributedType

from hf_lifecycle.engine.background_saves import Learned
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.hosts.accelerate.intercept import models_of
from hf_lifecycle.hosts.accelerate.saves.background import DeferredRank
from hf_lifecycle.hosts.accelerate.saves.sharded import PartsBackground
from hf_lifecycle.hosts.accelerate.saves.template import numbered
from hf_lifecycle.saving.captured import WrittenSave
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.sharded.archives import (
    EngineTensors,
    WrittenArchive,
    handed_over,
    obstacle_to_engine,
    rest_of,
)
from hf_lifecycle.saving.snapshots.placement import LiveTensor
from hf_lifecycle.torch_internals import storage_id

__all__ = ["EngineBackground", "is_of_deepspeed"]


def is_of_deepspeed(accelerator: Any) -> bool:
    """Whether DeepSpeed trains the models of this accelerator."""
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)


@dataclass(slots=True, kw_only=True)
class DeferredEngines(DeferredRank):
    """One rank's part of a save that was captured.

    Attributes:
        archives: What the engines handed to ``torch.save``.
    """

    archives: Sequence[WrittenArchive]

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        for one in self.archives:
            one.write(files, session.folder, self.snapshot)
        self.write_rank_file(session.folder, {})
        return {}


class _Template(NamedTuple):
    """That the engines' files are written here as by themselves.

    Attributes:
        ingredients: How many engines there are.
    """

    ingredients: int


class _Present(NamedTuple):
    """That a save can be captured."""

    def named(self) -> dict[str, Any]:
        """No tensors that are proved: what an engine has loaded, it alone knows."""
        return {}


class EngineBackground(PartsBackground[_Template]):
    """As :class:`~hf_lifecycle.hosts.accelerate.saves.sharded.PartsBackground`, where DeepSpeed trains."""

    _written: tuple[WrittenArchive, ...] = ()  # by the last save of accelerate's own

    @property
    def _engines(self) -> list[Any]:
        return models_of(self._accelerator)

    def prepare(self) -> _Present | None:
        """Whether the save that is due can be captured on all ranks; else accelerate makes it."""
        self.begin()
        reason: str | None = ""
        if self.template is not None:
            reason = self._obstacle()
            if reason is None:
                reason = self.overlap.obstacle() if self.fits(len(self._engines)) else ""
        return _Present() if self.agree(reason) else None

    def _obstacle_to_files(self) -> str | None:
        return next(filter(None, map(obstacle_to_engine, self._engines)), None)

    def _tensors(self, archives: Sequence[WrittenArchive]) -> list[LiveTensor]:
        own = [
            one
            for number, engine in enumerate(self._engines)
            for one in EngineTensors(engine, f"model {number}.", f"optimizer {number}").tensors
        ]
        held = {storage_id(storage) for one in archives for storage in one.archive.storages}
        own = [one for one in own if storage_id(one.tensor) in held]  # nothing else is proved of a loop's engines
        return [*own, *rest_of(archives, own)]

    @contextmanager
    def watching(self) -> Iterator[None]:
        with handed_over([] if self.is_left_to_host else self._engines, is_written=True) as archives:
            yield
        self._written = tuple(archives.values())

    def learn_from(self, session: SaveSession) -> WrittenSave | None:
        try:
            return super().learn_from(session)
        finally:
            self._written = ()

    def _look(self, folder: Path) -> Learned[_Template]:
        comparisons = [one.comparison(folder) for one in self._written]
        plans = [one.plan for one in self._written]
        return Learned(_Template(len(self._engines)), comparisons, self._tensors(self._written), plans)

    def captured(self, session: SaveSession, _: _Present, *, overlap: bool, **own: Any) -> DeferredEngines:
        """As :meth:`~hf_lifecycle.hosts.accelerate.saves.background.Background.captured`."""
        with handed_over(self._engines, is_written=False) as found:
            for number, engine in enumerate(self._engines):
                engine.save_checkpoint(str(session.folder), numbered(MODEL_NAME, number))  # as accelerate calls it
        archives = tuple(found.values())
        make = functools.partial(DeferredEngines, archives=archives, rank=self._ranks.rank, **own)
        return self.capture(session.step, session.began, self._tensors(archives), make, overlap=overlap)
