"""Saves that training does not stop for: captured while Trainer believes that it saves, written by a thread.

The first save of a training is Trainer's own, and the template of all others: a thread compares its files with what
they were made of, and commits them. Where they hold something else, the next save is Trainer's own too, and compared
while training waits. From then on Trainer's ``_save_checkpoint`` still runs, but of it ``save_model`` and
``_save_optimizer_and_scheduler`` only capture: small state at once, tensors into a snapshot that is copied while the
next forward and backward run. Before the optimizer steps, the copy is waited for. Where a template cannot be had,
Trainer goes on saving, and one line says why.

A snapshot that was torn (something wrote to a tensor between the save and the step) is thrown away and said, and the
next step is saved in its place, with everything copied at once.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.engine.background_saves import COSTS_THE_BACKGROUND, BackgroundSaves, Commit, Learned
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.hosts.trainer.callback_order import readers
from hf_lifecycle.hosts.trainer.component import Component
from hf_lifecycle.hosts.trainer.intercept import EPOCH, SAVE_MODEL, SAVE_OPTIMIZER, SAVE_RNG
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, on_exception, replaced
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.save_metrics import report
from hf_lifecycle.hosts.trainer.saves.deferred import DeferredSave, RankState, capture_state
from hf_lifecycle.hosts.trainer.saves.rng_file import rng_states
from hf_lifecycle.hosts.trainer.saves.sharded import DeferredShards, ShardedSaves, is_sharded, obstacle_to_shards
from hf_lifecycle.hosts.trainer.saves.template import Template, ingredients, observe, obstacle_to, template_of
from hf_lifecycle.hosts.trainer.saves.unresumable import Unresumable
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files.archive import TorchArchive
from hf_lifecycle.saving.files.layout import NotLearned
from hf_lifecycle.saving.snapshots.gc_pause import gc_paused
from hf_lifecycle.saving.snapshots.live import computed_state, live_tensors, model_tensors
from hf_lifecycle.saving.snapshots.state_copies import StateCopies
from hf_lifecycle.state.proof import unwrapped

__all__ = ["Background"]

logger = logging.getLogger("hf_lifecycle")

_OTHERWISE = "saves are made by Trainer, in the training loop"
_Live = Mapping[str, torch.Tensor]  # the model's tensors, by each of their names


class Background(Component):
    """Makes this trainer's saves in the background, where that is proved to give what Trainer would have written.

    Args:
        wanted: Whether the user wants it.
        weights: Their part of the state, which is completed from the snapshot.
        directory: Is told of each save.
        ranks: The processes that save together; the first of them alone saves in the background, or each its shards.
        unresumable: Tells what no resume can go on from.
    """

    key = "background"

    def __init__(
        self, wanted: bool, weights: Weights, directory: RunDirectory, ranks: Ranks, unresumable: Unresumable
    ) -> None:
        self._is_chosen = self._wanted = wanted
        self._ranks = ranks
        self._unproved: int | None = None  # the step of a save whose snapshot may be torn; known on every rank
        self._weights = weights
        self._trainer: Any = None
        self._directory = directory
        self._saves: BackgroundSaves[Any] = self._of_whole_files()
        self._copies = StateCopies("optimizer")
        self._capture: DeferredSave | DeferredShards | None = None  # asked for, and not handed to the writer yet
        self.unresumable = unresumable
        self._ours = MethodPatches()
        self._has_said_so = False
        self._reports: list[dict[str, float]] = []

    def _of_whole_files(self) -> BackgroundSaves[Any]:
        return BackgroundSaves(self._directory, host="Trainer", otherwise=_OTHERWISE)

    def prepare(self, args: TrainingArguments, trainer: Any) -> None:
        """Look at the trainer whose saves are staged; ``trainer`` is None where it cannot be had."""
        is_shared = self._wanted and trainer is not None and is_sharded(trainer)
        self._wanted &= trainer is not None and (args.should_save or is_shared)
        if is_shared:
            files = self.unresumable.files
            self._saves = ShardedSaves(self._directory, trainer, self._weights, files, otherwise=_OTHERWISE)
        elif isinstance(self._saves, ShardedSaves):  # of another training
            self._saves = self._of_whole_files()
        reason = (obstacle_to_shards if is_shared else obstacle_to)(trainer) if self._wanted else None
        if reason is not None:
            self._leave_to_trainer(reason)
        if not self._wanted and not is_shared:
            return
        self._trainer = trainer
        self._saves.overlap.wait_before([trainer.optimizer])
        self._wait_where_training_breaks_off(trainer)

    def wait_before(self, optimizers: list[Any]) -> None:
        """Let the steps of these wait for a copy too, beside those of Trainer's optimizer."""
        if self._trainer is not None and optimizers:
            self._saves.overlap.wait_before([self._trainer.optimizer, *optimizers])

    def _leave_to_trainer(self, reason: str) -> None:
        self._wanted = False
        self._saves.leave_to_host(reason)

    def _wait_where_training_breaks_off(self, trainer: Any) -> None:
        """Let an exception leave the training loop only when what is in flight is written."""
        self._ours.replace(trainer, EPOCH, on_exception(self._saves.join))

    def save(self, state: TrainerState, save: Callable[[], object]) -> None:
        """Let Trainer save: itself, watched, or captured."""
        self._saves.begin()
        self._capture, self._unproved = None, state.global_step if self._is_chosen else None
        if isinstance(self._saves, ShardedSaves):
            self._capture = self._saves.save(state, save)
            return
        obstacle = self._weights.obstacle() if self._wanted else None
        if obstacle is not None:
            self._leave_to_trainer(obstacle)
        if not self._wanted:
            save()
            return
        live = live_tensors(unwrapped(self._trainer.model))  # once a save: it goes through all modules
        if self._saves.fits(ingredients(self._trainer, live)):
            with gc_paused():
                self._capture_save(state, live, save)
        else:
            self._learn(state, live, save)

    def _learn(self, state: TrainerState, live: _Live, save: Callable[[], object]) -> None:
        began = time.monotonic()
        seen = observe(self._trainer, save)

        def look() -> Learned[Template]:
            template, comparisons = template_of(self._trainer, seen, at_once=self._saves.at_once)
            optimizer, tensors = self._copies.of(self._trainer.optimizer.state_dict())
            every = [*model_tensors(live, template.names), *tensors]
            return Learned(template, comparisons, every, template.plans(live, optimizer))

        self._saves.learn(state.global_step, began, look)
        self._wanted &= not self._saves.is_left_to_host

    def _capture_save(self, state: TrainerState, live: _Live, save: Callable[[], object]) -> None:
        template, trainer, began = self._saves.template, self._trainer, time.monotonic()
        assert template is not None
        waited = self._saves.asked(state.global_step)
        obstacle = computed_state([unwrapped(trainer.model)]) or self._saves.overlap.obstacle()
        if obstacle is not None:
            self._leave_to_trainer(obstacle)
            save()
            return

        def model_instead(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(output_dir: str, *given: Any, **named: Any) -> None:
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                try:
                    template.owned.write(trainer, output_dir)
                    self._capture = self._captured(state, live, began, waited)
                except (NotLearned, TypeError, *COSTS_THE_BACKGROUND) as error:
                    self._leave_to_trainer(f"{type(error).__name__}: {error}")
                    own(output_dir, *given, **named)

            return method

        def nothing_instead(own: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *given, **named: own(*given, **named) if self._capture is None else None

        def rng_instead(own: Callable[..., Any]) -> Callable[..., Any]:
            def method(output_dir: str) -> None:
                if self._capture is None:
                    own(output_dir)
                else:
                    self._capture.rng = rng_states(trainer.args)

            return method

        instead = {SAVE_MODEL[0]: model_instead, SAVE_OPTIMIZER: nothing_instead}
        if template.rng_file is not None:
            instead[SAVE_RNG] = rng_instead
        with replaced(trainer, **instead), replaced(trainer.state, save_to_json=nothing_instead):
            save()

    def _captured(self, state: TrainerState, live: _Live, began: float, waited: float) -> DeferredSave:
        template, trainer = self._saves.template, self._trainer
        assert template is not None
        optimizer, tensors = self._copies.of(trainer.optimizer.state_dict())
        # Where no step follows there is nothing to overlap with, and nothing to make up for a torn snapshot by.
        goes_on = state.global_step < state.max_steps and not trainer.control.should_training_stop
        snapshot = self._saves.overlap.take([*model_tensors(live, template.names), *tensors], overlap=goes_on)
        scheduler = None
        if template.has_scheduler:  # a learning rate may be a tensor, which the next step changes
            scheduler = TorchArchive(copy.deepcopy(trainer.lr_scheduler.state_dict()), "scheduler")
        return DeferredSave(
            step=state.global_step,
            template=template,
            snapshot=snapshot,
            optimizer=optimizer,
            scheduler=scheduler,
            has_arguments=template.has_arguments,
            rng_file=template.rng_file,
            weights=self._weights.defer(live, snapshot.watch),
            files=self.unresumable.files,
            asked=began,
            stall=waited,
        )

    @property
    def captured(self) -> bool:
        """Whether what Trainer has just saved is to be written in the background."""
        return self._capture is not None

    @property
    def has_written(self) -> bool:
        """Whether what Trainer has just saved is a template, so that it is to be proved in the background."""
        return self._saves.written is not None

    def begin_part(self, session: SaveSession) -> None:
        """What this rank has captured, or has to prove, is going to be handed over, where each rank has a part."""
        if isinstance(self._saves, ShardedSaves) and (self.captured or self.has_written):
            session.parts.begin()

    def prove(self, session: SaveSession, commit: Commit) -> None:
        """Let what Trainer has written be proved and committed, now that the state of each rank is added."""
        self._saves.prove(session, self._weights.digests, commit)
        self._wait_for_readers()

    def hand_over(
        self, args: TrainingArguments, state: TrainerState, session: SaveSession, rank: RankState, commit: Commit
    ) -> None:
        """Let the captured save be written and committed.

        Args:
            args: Trainer's arguments, with its final paths.
            state: Trainer's state, with its final paths.
            session: Its folder has what Trainer wrote itself.
            rank: What this rank adds.
            commit: Commits it.
        """
        save, self._capture = self._capture, None
        assert save is not None
        self._saves.overlap.guard(save)
        if save.has_arguments:
            save.arguments = TorchArchive(args, "training_args")
        kept = capture_state(state)

        def done(size: int) -> None:
            self._reports.append(save.told(size))

        if isinstance(save, DeferredShards):
            assert isinstance(self._saves, ShardedSaves)
            self._saves.start(save, session, kept, rank, commit, done)
        else:
            whole = save
            self._saves.hand_over(
                whole, session, lambda blocks: whole.write(session.folder, blocks, kept, rank), commit, done
            )
        self._wait_for_readers()

    def _wait_for_readers(self) -> None:
        """Callbacks that hear ``on_save``, and a subclass's code after the save, may look for the checkpoint."""
        reading = readers(self._trainer, self)
        if reading and not self._has_said_so:
            said = "saves block until they are written, since these may read the checkpoint right after the save: %s"
            logger.warning(said, "; ".join(reading))
            self._has_said_so = True
        is_shared = isinstance(self._saves, ShardedSaves)
        if any(self._ranks.gather(bool(reading), what="who reads a checkpoint")) if is_shared else reading:
            self._saves.join()
            if is_shared:
                self._ranks.barrier(what="writing a checkpoint that is read")

    def settle(self) -> bool | None:
        """Wait for the save in flight. Returns whether it is committed, or was torn; None if there was none.

        Raises:
            SaveFailed: It went wrong.
        """
        return self._saves.settle()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._unproved is None or state.global_step <= self._unproved:
            return
        self._unproved = None
        if any(self._ranks.gather(self._saves.overlap.make_up(), what="whether a save is to be made up for")):
            control.should_save = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "train_runtime" in (kwargs.get("logs") or {}):  # the last row, after which the tools close
            self._saves.join()
        reports, self._reports = self._reports, []
        if reports and self._trainer is not None:
            report(self._trainer, reports, args, state, control)

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        with contextlib.suppress(SaveFailed):  # the thread has said so, and who could act on it was told
            self.settle()
        self._trainer = None
        self._copies.clear()
        self._saves.overlap.close()
        if isinstance(self._saves, ShardedSaves):
            self._saves.forget()
