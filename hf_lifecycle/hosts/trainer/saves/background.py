"""Saves that training does not stop for: captured while Trainer believes that it saves, written by a thread.

The first save of a training is Trainer's own, and the template of all others: a thread compares its files with what
they were made of, and commits them. Where they hold something else, the next save is Trainer's own too, and compared
while training waits. Who captures, and what, says :class:`~hf_lifecycle.hosts.trainer.saves.whole.WholeSaves`, or of a
sharded model :class:`~hf_lifecycle.hosts.trainer.saves.sharded.ShardedSaves`, and under DeepSpeed
:class:`~hf_lifecycle.hosts.trainer.saves.deepspeed.EngineSaves`. Before the optimizer steps, the copy is waited for.
Where a template cannot be had, Trainer continues saving, and one line says why.

A snapshot that was torn (something wrote to a tensor between the save and the step) is thrown away and said, and the
next step is saved in its place, with everything copied at once.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import TrainerState, TrainingArguments

from hf_lifecycle.engine.background_saves import Commit
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.hosts.trainer.callback_order import readers
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import training_frame
from hf_lifecycle.hosts.trainer.intercept import EPOCH
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, on_exception
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.saves.deepspeed import EngineSaves, is_of_deepspeed, obstacle_to_deepspeed
from hf_lifecycle.hosts.trainer.saves.deferred import PartSaves, RankState, capture_state
from hf_lifecycle.hosts.trainer.saves.sharded import ShardedSaves, is_sharded, obstacle_to_shards
from hf_lifecycle.hosts.trainer.saves.template import obstacle_to
from hf_lifecycle.hosts.trainer.saves.unresumable import Unresumable
from hf_lifecycle.hosts.trainer.saves.whole import WholeSaves
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.files.archive import TorchArchive

__all__ = ["Background"]

logger = logging.getLogger("hf_lifecycle")

_INTEGRATIONS = "transformers.integrations."
_OTHERWISE = (
    "no background saves: Trainer makes each save, and training stops until it is written; the checkpoints are the same"
)

# Saves of which every rank writes a part: of which trainers, whose, and what stands against them.
_SHARED: tuple[tuple[Any, Any, Any], ...] = (
    (is_sharded, ShardedSaves, obstacle_to_shards),
    (is_of_deepspeed, EngineSaves, obstacle_to_deepspeed),
)


class Background(Component):
    """Makes this trainer's saves in the background, where that is proved to give what Trainer would have written.

    Args:
        ranks: The processes that save together; the first of them alone saves in the background, or each its shards.
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
        self._whole = WholeSaves(directory, weights, unresumable.files, otherwise=_OTHERWISE)
        self._saves: WholeSaves | ShardedSaves | EngineSaves = self._whole
        self._capture: Any = None  # the save that was asked for, and not handed to the writer yet
        self.unresumable = unresumable
        self._ours = MethodPatches()
        self._has_said_so = False
        self._reading: list[str] = []
        self._is_read = False  # right after the save that is made, on some rank
        self._reports: list[dict[str, float]] = []

    def prepare(self, args: TrainingArguments, trainer: Any) -> None:
        """Look at the trainer whose saves are staged; ``trainer`` is None where it cannot be had."""
        shared = [kind for kind in _SHARED if self._wanted and trainer is not None and kind[0](trainer)]
        self._wanted &= trainer is not None and (args.should_save or bool(shared))
        self._saves = self._whole
        if not self._wanted:
            return
        obstacle = obstacle_to
        if shared:
            _, saves, obstacle = shared[0]
            files = self.unresumable.files
            self._saves = saves(self._directory, trainer, self._weights, files, otherwise=_OTHERWISE)
        reason = obstacle(trainer)
        if self._directory.nodes.several:
            reason = "save_on_each_node: the nodes commit each save together"
        if reason is not None:
            self._saves.leave_to_host(reason)
            if not shared:
                return
        self._trainer = self._whole.trainer = trainer
        self._saves.overlap.wait_before([trainer.optimizer])
        # An exception leaves the training loop only when what is in flight is written.
        self._ours.replace(trainer, EPOCH, on_exception(self._saves.join))

    def wait_before(self, optimizers: list[Any]) -> None:
        """Let the steps of these wait for a copy too, beside those of Trainer's optimizer."""
        if self._trainer is not None and optimizers:
            self._saves.overlap.wait_before([self._trainer.optimizer, *optimizers])

    def look(self) -> tuple[bool, str | None]:
        """A save is due, and the one before is settled. Returns what this rank tells the others, for :meth:`decide`."""
        self._saves.begin()
        self._reading, is_read, obstacle = [], False, None
        if self._wanted:
            self._reading = [] if self._trainer is None else readers(self._trainer, self)
            # In the handler of an interrupt, what follows may read it too.
            is_read = bool(self._reading) or training_frame() is None
            obstacle = self._shared.look() if self._shared is not None else None
        return is_read, obstacle

    def decide(self, state: TrainerState, told: Sequence[tuple[bool, str | None]]) -> None:
        """How the save is made, by what every rank has told."""
        self._capture, self._unproved = None, state.global_step if self._is_chosen else None
        self._is_read = any(is_read for is_read, _ in told)
        if (saves := self._shared) is not None:
            saves.all_capture = saves.decide([obstacle for _, obstacle in told])

    def save(self, state: TrainerState, save: Callable[[], object]) -> None:
        """Let Trainer save: itself, watched, or captured."""
        if self._wanted:
            self._capture = self._saves.save(state, save)
        else:
            save()

    @property
    def _shared(self) -> ShardedSaves | EngineSaves | None:
        """The saves, where all ranks capture the one that is due, or none does; else None."""
        saves = self._saves
        return saves if self._wanted and isinstance(saves, PartSaves) and not saves.is_left_by_all else None

    @property
    def all_captured(self) -> bool:
        """Whether what Trainer has just saved is captured, on every rank."""
        return self.captured and isinstance(self._saves, PartSaves)

    @property
    def captures(self) -> bool:
        """Whether there is a template, so that the next save is captured, if it fits."""
        return self._wanted and self._saves.template is not None

    @property
    def captured(self) -> bool:
        """Whether what Trainer has just saved is to be written in the background."""
        return self._capture is not None

    @property
    def has_written(self) -> bool:
        """Whether what Trainer has just saved is a template, so that it is to be proved in the background."""
        return self._saves.written is not None

    def begin_part(self, session: SaveSession) -> None:
        """What this rank has captured, or has to prove, is going to be handed over."""
        if self.captured or self.has_written:
            self._saves.begin_part(session)

    def prove(self, session: SaveSession, commit: Commit) -> None:
        """Let what Trainer has written be proved and committed, now that the state of each rank is added."""
        self._saves.prove(session, self._weights.digests, commit)

    def complete(self, args: TrainingArguments, state: TrainerState, rank: RankState) -> None:
        """Give the captured save what else it is made of.

        Args:
            args: Trainer's arguments, with its final paths.
            state: Trainer's state, with its final paths.
        """
        save = self._capture
        if save.template.has_arguments:
            save.arguments = TorchArchive(args, "training_args")
        save.state, save.rank = capture_state(state), rank

    def hand_over(self, session: SaveSession, commit: Commit) -> None:
        """Let the captured save, which is complete, be written and committed."""
        save, self._capture = self._capture, None
        self._saves.hand_over(save, session, commit, lambda size: self._reports.append(save.cost(size)))

    def wait_for_readers(self) -> None:
        """Callbacks that hear ``on_save``, and a subclass's code after the save, may look for the checkpoint."""
        if self._reading and not self._has_said_so:
            said = "training stops until each save is written, since these may read the checkpoint right after it: %s"
            logger.warning(said, "; ".join(self._reading))
            self._has_said_so = True
        if self._is_read:
            self._saves.join()
            self._ranks.barrier(what="writing a checkpoint that is read")

    def settle(self) -> bool | None:
        """Wait for the save in flight. Returns whether it is committed, or was torn; None if there was none.

        Raises:
            SaveFailed: It went wrong.
        """
        return self._saves.settle()

    def on_step_begin(self, event: Event) -> None:
        self._saves.begin_writing()

    def on_step_end(self, event: Event) -> None:
        if self._unproved is None or event.state.global_step <= self._unproved:
            return
        self._unproved = None
        if any(self._ranks.gather(self._saves.overlap.make_up(), what="deciding whether a failed save is repeated")):
            event.control.should_save = True

    def on_log(self, event: Event) -> None:
        if "train_runtime" in (event.more.get("logs") or {}):  # the last row, after which the tools close
            self._saves.join()
        reports, self._reports = self._reports, []
        if reports and self._trainer is not None:
            _tell_tools(self._trainer, reports, event)

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        with contextlib.suppress(SaveFailed):  # the thread has said so, and who could act on it was told
            self.settle()
        self._trainer = None
        self._saves.overlap.close()
        self._saves.forget()
        self._whole.forget()


def _tell_tools(trainer: Any, rows: Sequence[Mapping[str, float]], event: Event) -> None:
    """Tell what saves cost to the tools that draw a run, transformers' integrations: TensorBoard, W&B and the like.

    In rows of its own, under ``lifecycle/``. Neither ``log_history`` nor other callbacks see them, so a run's log stays
    what it is without them.
    """
    handler = trainer.callback_handler
    tools = [tool for tool in handler.callbacks if type(tool).__module__.startswith(_INTEGRATIONS)]
    for row in rows:
        for tool in tools:
            tool.on_log(event.args, event.state, event.control, logs=dict(row), model=handler.model)
