"""Saves of a trainer that DeepSpeed trains: each rank captures what its engine hands to ``torch.save``, and writes it.

Of every save, Trainer's ``_save_checkpoint`` and the engine's ``save_checkpoint`` run on every rank; the engine's files
alone are not written (:mod:`~hf_lifecycle.saving.sharded.archives`). At the first save of a training they are, and a
thread compares them with what is written here of the same state.

The file that ``save_model`` writes is written in the background too where the weights are whole on rank 0. Under ZeRO-3
they are gathered for it, which is a collective; there, and with adapters, Trainer writes it in the training loop.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerState

from hf_lifecycle.engine.background_saves import Learned
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.hosts.trainer.intercept import SAVE_MODEL, SAVE_OPTIMIZER
from hf_lifecycle.hosts.trainer.method_patching import replaced
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
from hf_lifecycle.hosts.trainer.saves.withheld import learned_rng_file, step_follows, withheld
from hf_lifecycle.saving.captured import Provable
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.files.comparison import comparison_of_layout
from hf_lifecycle.saving.files.layout import NotLearned, SafetensorsLayout, layout_by_name
from hf_lifecycle.saving.sharded.archives import EngineTensors, WrittenArchive, handed_over, obstacle_to_engine, rest_of
from hf_lifecycle.saving.snapshots.live import computed_state, live_tensors
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.proof import unwrapped

__all__ = ["DeferredEngine", "EngineSaves", "is_of_deepspeed", "obstacle_to_deepspeed"]

logger = logging.getLogger("hf_lifecycle")

_Archives = Mapping[Path, WrittenArchive]


def is_of_deepspeed(trainer: Any) -> bool:
    """Whether DeepSpeed trains."""
    return bool(getattr(trainer, "is_deepspeed_enabled", False))


def obstacle_to_deepspeed(trainer: Any) -> str | None:
    """Why the files of this trainer's engine cannot be written elsewhere."""
    if trainer.args.save_only_model:
        return "with save_only_model, DeepSpeed saves nothing"
    return other_methods(trainer) or obstacle_to_engine(trainer.model_wrapped)


def _obstacle_to_model_file(trainer: Any) -> str | None:
    """Why Trainer has to write what ``save_model`` does, in the training loop; if that is known before."""
    engine, model = trainer.model_wrapped, unwrapped(trainer.model)
    if engine.zero_optimization_partition_weights():
        return "the weights are sharded (ZeRO-3)"
    if getattr(model, "peft_config", None):
        return "it has the adapter alone"
    if any(getattr(trainer, name, False) for name in ("is_tp_enabled", "is_distributed_loading_by_transformers")):
        return "the weights are sharded"
    return overridden_writers(model) or computed_state([model])


@dataclass(frozen=True, slots=True)
class EngineTemplate:
    """The files of a save beside the engine's.

    Attributes:
        has_model: Whether what ``save_model`` does is done here.
        layouts: Of it the files with weights, by path, on the rank that writes them.
        static: The others of ``save_model``, by path.
        owned: The files that their owner writes at each save.
        has_arguments: Whether there is a ``training_args.bin``.
        rng_file: As of :class:`~hf_lifecycle.hosts.trainer.saves.template.Template`.
        ingredients: What the files of ``save_model`` are made of, if they are written here.
    """

    has_model: bool
    layouts: Mapping[str, SafetensorsLayout]
    static: Mapping[str, bytes]
    owned: Owned
    has_arguments: bool
    rng_file: str | None
    ingredients: Any


@dataclass(slots=True, kw_only=True)
class DeferredEngine(DeferredFiles):
    """One rank's part of a save that was captured.

    Attributes:
        archives: What the engine handed to ``torch.save``.
        optimizer: The optimizer's state, with tensors that lie where the live ones did.
    """

    archives: Sequence[WrittenArchive]
    optimizer: Any

    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        self.write_model(files)
        for one in self.archives:
            one.write(files, session.folder, self.snapshot)
        self.write_small(files, session.folder, self.snapshot.tree(self.optimizer))
        return {}


class EngineSaves(PartSaves[EngineTemplate]):
    """As :class:`~hf_lifecycle.hosts.trainer.saves.deferred.PartSaves`, of a trainer that DeepSpeed trains."""

    def _watched(self, save: Callable[[], object]) -> Callable[[], Learned[EngineTemplate]]:
        with self._handed_over(is_written=True) as archives:
            seen = observe(self._trainer, save)
        return lambda: self._learned(seen, archives)

    def _look(self) -> str | None:
        if self.template is None:
            return ""
        obstacle = self._weights.obstacle() or obstacle_to_deepspeed(self._trainer)
        if obstacle is not None:
            return obstacle
        return self.overlap.obstacle() if self.fits(self._ingredients(bool(self.template.layouts))) else ""

    def _ingredients(self, are_of_use: bool) -> Any:
        model = unwrapped(self._trainer.model)
        return (ingredients(self._trainer, live_tensors(model)), computed_state([model])) if are_of_use else None

    def _handed_over(self, *, is_written: bool) -> AbstractContextManager[_Archives]:
        return handed_over([self._trainer.model_wrapped], is_written=is_written)

    def _captured(self, state: TrainerState, save: Callable[[], object]) -> DeferredEngine:
        template, trainer = self.template, self._trainer
        assert template is not None
        captured: DeferredEngine | None = None

        def optimizer_captured(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(output_dir: str) -> None:
                nonlocal captured
                own(output_dir)  # with the collectives of the engine
                captured = self._snapshot(template, state, archives)

            return method

        def saved_once(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(*given: Any, **named: Any) -> None:
                with replaced(trainer.model_wrapped, save_checkpoint=lambda _: lambda *_, **__: None):
                    own(*given, **named)  # which lets the engine save if it gathers nothing; it is about to save again

            return method

        methods: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
            SAVE_OPTIMIZER: optimizer_captured,
            # Where the weights are whole, save_model meets no other rank.
            SAVE_MODEL[0]: self._by_owners(template.owned) if template.has_model else saved_once,
        }
        with (
            self._handed_over(is_written=False) as archives,
            withheld(trainer, template.rng_file, lambda: captured, **methods),
        ):
            save()
        assert captured is not None
        return captured

    def _snapshot(self, template: EngineTemplate, state: TrainerState, archives: _Archives) -> DeferredEngine:
        present = EngineTensors(self._trainer.model_wrapped)
        tensors = [*present.tensors, *rest_of(archives.values(), present.tensors)]

        def make(*, snapshot: Snapshot, **moment: Any) -> DeferredEngine:
            return DeferredEngine(
                template=template,
                snapshot=snapshot,
                archives=tuple(archives.values()),
                optimizer=present.optimizer,
                scheduler=None,  # Trainer writes it, if DeepSpeed does not
                weights=self._weights.defer(present.live, snapshot.watch),
                files=self._loadable,
                has_state=self._trainer.args.should_save,
                **moment,
            )

        return self.capture(state.global_step, self.began, tensors, make, overlap=step_follows(self._trainer, state))

    def _model_files(self, seen: Observed) -> tuple[str | None, dict[str, SafetensorsLayout], dict[str, bytes]]:
        """Why Trainer has to write what ``save_model`` writes; else its files with weights, and the others."""
        why = _obstacle_to_model_file(self._trainer)
        if not self._trainer.args.should_save:
            return why, {}, {}
        if why is None:
            assert seen.checkpoint is not None
            try:
                static, weights = files_of_model(seen)
                live = live_tensors(unwrapped(self._trainer.model))
                found = {name: layout_by_name(seen.checkpoint / name, live) for name in weights}
                layouts = {name: layout for name, layout in found.items() if layout is not None}
                if len(layouts) == len(found):
                    return None, layouts, static
                why = "it has other tensors than the model"
            except NotLearned as error:
                why = str(error)
        logger.info(
            "DeepSpeed's files are written in the background; Trainer writes the file with the weights alone, in the "
            "training loop: %s",
            why,
        )
        return why, {}, {}

    def _learned(self, seen: Observed, archives: _Archives) -> Learned[EngineTemplate]:
        trainer, folder = self._trainer, seen.checkpoint
        reason = obstacle_to_deepspeed(trainer)
        if reason is not None or folder is None or (trainer.args.should_save and not archives):
            raise NotLearned(reason or "DeepSpeed's engine wrote nothing")
        comparisons: list[Provable] = [one.comparison(folder) for one in archives.values()]
        why, layouts, static = self._model_files(seen)
        present = EngineTensors(trainer.model_wrapped)
        comparisons += [comparison_of_layout(name, layout, present.live) for name, layout in layouts.items()]
        template = EngineTemplate(
            why is None,
            layouts,
            static,
            seen.owned if layouts else Owned(),
            bool(layouts) and ARGUMENTS in seen.of_model,
            learned_rng_file(trainer, folder),
            self._ingredients(bool(layouts)),
        )
        tensors = [*present.tensors, *rest_of(archives.values(), present.tensors)]
        return Learned(template, comparisons, tensors, [one.plan for one in archives.values()])
