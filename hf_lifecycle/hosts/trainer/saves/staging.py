"""Where Trainer writes a checkpoint before it is one.

Trainer writes in place. While its own ``_save_checkpoint`` runs, and only then, the checkpoint's folder lies in a
hidden one; when it has run, the state of this package is added, and the checkpoint is flushed, given its manifest and
renamed into place, or handed to the writer with all that it needs for that. No event is awaited: whoever called, and
the code of a subclass after ``super()._save_checkpoint()``, finds it under its name. So no torn directory ever bears
the name ``checkpoint-N``, also for scripts that look for the last checkpoint before any Trainer exists.
``args.output_dir`` is not changed. Retention, which Trainer would do before the save is complete, is done after it.

With several ranks all of them write their part into the same folder, rank 0 commits once every part is written, and a
save that failed on one has failed on all. With ``save_on_each_node`` on several nodes, each node writes the whole
checkpoint into a folder of its own, gets the parts of the other nodes' ranks, and its first rank commits.

Left to Trainer as it is: ``push_to_hub`` (it uploads from the output directory), hyperparameter search (its output
directories are its own), shards with ``save_on_each_node``, and ranks that ``torch.distributed`` does not connect.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_lifecycle.checkpoint.directory.manifest import Manifest, Metric
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import RankFailed, SaveFailed
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.host import present_trainer
from hf_lifecycle.hosts.trainer.intercept import LOAD_BEST, OUTPUT_DIR
from hf_lifecycle.hosts.trainer.journal import Journal
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches, borrow, give_back, holding, replaced
from hf_lifecycle.hosts.trainer.resume.source import checkpoint_of
from hf_lifecycle.hosts.trainer.saves.background import Background
from hf_lifecycle.hosts.trainer.saves.deferred import Content, RankState
from hf_lifecycle.hosts.trainer.saves.last_save import LastSave
from hf_lifecycle.hosts.trainer.saves.output_directory import leaves_saving_to_trainer
from hf_lifecycle.hosts.trainer.saves.withheld import around_own_save
from hf_lifecycle.hosts.trainer.stopping import default_monitor
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.captured import Save
from hf_lifecycle.saving.snapshots.gc_pause import gc_paused

__all__ = ["Staging"]

logger = logging.getLogger(__name__)


class Staging(Component):
    """Lets Trainer save into the staging folder, and commits what it saved.

    Args:
        monitor: The metric that checkpoints are judged by, with or without ``eval_``; None for
            :func:`~hf_lifecycle.hosts.trainer.stopping.default_monitor`.

    Attributes:
        saved_step: The step of the last save, whether or not it failed; -1 before the first.
    """

    key = "staging"

    def __init__(
        self, directory: RunDirectory, journal: Journal, monitor: str | None, background: Background, ranks: Ranks
    ) -> None:
        self._directory = directory
        self._journal = journal
        self._monitor = monitor
        self.background = background
        self._ranks = ranks
        self.saved_step = -1
        self._attempt = ""
        self._best_before: str | None = None  # what state.best_model_checkpoint was before the save that is made
        self._last: LastSave | None = None
        self._state: TrainerState | None = None
        self._content: Content | None = None
        self._has_said_so = False
        self._elsewhere: Path | None = None  # where Trainer has just saved, if not into the output directory
        self._stop_intercepting: Callable[[], None] | None = None
        self._ours = MethodPatches()

    def prepare(
        self, args: TrainingArguments, state: TrainerState, attempt: str, resumed_from: Path | None, content: Content
    ) -> None:
        """Take the directory's lock, Trainer's retention, and its saving.

        Raises:
            DirectoryInUse: Another process saves there. On other ranks than the first: ``RankFailed``.
            UnsupportedTraining: The ranks do not have one directory in common, or two nodes have.
        """
        # With auto_find_batch_size, Trainer begins once more from it when memory runs out.
        self._directory.begin(resumed_from, may_again=args.auto_find_batch_size)
        self._attempt, self._state, self._content = attempt, state, content
        self._last = LastSave(self._directory, self.background, self._ranks, state)
        if leaves_saving_to_trainer(args, state, self._ranks, self._directory.nodes):
            self._directory.leave_to_host(keeps=args.save_total_limit is not None)
            self._journal.begin(state.global_step, attempt, resumed_from)
            return
        # Where no save is to come none may ever be, and the directory may be read-only: a save takes it.
        self._directory.open(takes=args.save_strategy != SaveStrategy.NO)
        borrow(args, "save_total_limit", None)  # old checkpoints are removed when the new one is whole
        trainer = present_trainer()
        if hasattr(trainer, OUTPUT_DIR):
            self._stop_intercepting = around_own_save(trainer, self._save)
        self.background.prepare(args, trainer if self._stop_intercepting is not None else None)
        if trainer is not None:
            self._ours.replace(trainer, LOAD_BEST, self._when_settled)
        self._journal.begin(state.global_step, attempt, resumed_from)

    def _save(self, trainer: Any, save: Callable[[], object]) -> None:
        """Make a whole checkpoint of what ``save``, Trainer's own ``_save_checkpoint``, writes; on every rank."""
        args, state = trainer.args, self._state
        assert state is not None
        step, place = state.global_step, getattr(trainer, OUTPUT_DIR)(trial=None)
        self._elsewhere = None if self._directory.is_at(place) else Path(os.path.abspath(place))
        if self._elsewhere is not None:
            self._say_in_place(f"Trainer saves into {place}, but training started with {self._directory.path}")
            save()
            return
        with self._ranks.working(f"saving step {step}"):  # one heartbeat for all blocks of the save
            self._save_here(args, state, trainer, save)

    def _save_here(
        self, args: TrainingArguments, state: TrainerState, trainer: Any, save: Callable[[], object]
    ) -> None:
        assert self._content is not None
        step = state.global_step
        self.saved_step, self._best_before = step, state.best_model_checkpoint
        is_best, failed = state.best_global_step == step, None
        with (
            gc_paused() if self.background.captures else nullcontext(),
            self._content.of_one_moment(args, state, trainer.control),
            SaveSession(self._directory, step, put_back=self._put_back_best, is_best=is_best) as session,
        ):
            failed = self._begin(state, session)
            if failed is None:
                self._write(args, state, trainer, save, session)
        if failed is not None:
            raise failed

    def _begin(self, state: TrainerState, session: SaveSession) -> SaveFailed | RankFailed | None:
        """Find room for the save, and decide how it is made, on every rank. Returns what keeps it from being made."""
        last, is_decided = self._last, False
        assert last is not None
        while not is_decided:
            with self._ranks.agree(what="making room for a checkpoint") as told:
                failed, look = last.told(), None
                if failed is None:
                    # Invariant: before what may fail on rank 0 alone. FSDP lets go here of what an evaluation has left
                    # gathered, and a rank where it did not would gather other tensors in the next step.
                    look = self.background.look()
                    session.place()
                told.own = failed, look
            if is_decided := not any(failed for failed, _ in told.each):
                self.background.decide(state, [look for _, look in told.each])
            elif (error := last.heard([failed for failed, _ in told.each])) is not None:
                session.cancel(error)
                return error
            self._best_before = state.best_model_checkpoint
        return None

    def _write(
        self,
        args: TrainingArguments,
        state: TrainerState,
        trainer: Any,
        save: Callable[[], object],
        session: SaveSession,
    ) -> None:
        """Write what the checkpoint has, or capture it; and have it committed."""
        rank = None
        with session.writing():
            self._save_into(session.folder.parent, trainer, save)
            if args.should_save and not self.background.captured:
                self.background.unresumable.look(session.folder, trainer)
            if is_later := self.background.all_captured:
                rank = self._add(args, state, session)
        if not is_later:
            with self._ranks.agree(what=f"writing the state of each rank at step {state.global_step}") as told:
                rank = self._add(args, state, session)
                told.own = rank is not None or self.background.has_written
            is_later = any(told.each)
        self._finish(args, state, session, is_captured=rank is not None, is_later=is_later)
        if is_later:
            self.background.wait_for_readers()

    def _put_back_best(self) -> None:
        assert self._state is not None
        self._state.best_model_checkpoint = self._best_before

    def _say_in_place(self, why: str) -> None:
        if not self._has_said_so:
            self._has_said_so = True
            logger.warning("checkpoints are written in place, as Trainer does, and may be torn by a kill: %s", why)

    def _when_settled(self, own: Callable[..., Any]) -> Callable[..., Any]:
        """``own``, which reads the best checkpoint, after the last save is complete, from where it was saved."""

        def method(*given: Any, **named: Any) -> Any:
            self.settle()
            assert self._state is not None
            best = self._state.best_model_checkpoint
            place = None if best is None else str(self._directory.resolved(best))
            with holding(self._state, "best_model_checkpoint", place):
                return own(*given, **named)

        return method

    def settle(self) -> None:
        """Wait for the save in flight; on every rank.

        Raises:
            SaveFailed: It went wrong, and training does not continue over that. On other ranks than the first:
                ``RankFailed``.
        """
        if self._stop_intercepting is not None:  # else Trainer writes in place
            assert self._last is not None
            self._last.settle()

    def _save_into(self, folder: Path, trainer: Any, save: Callable[[], object]) -> None:
        assert self._state is not None
        # Where there is a best step, Trainer meets in a collective amid the save, and a rank that fails before it
        # would leave the others there.
        best = holding(self._state, "best_global_step", None) if self._ranks.world_size > 1 else nullcontext()
        with replaced(trainer, **{OUTPUT_DIR: lambda _: lambda *_, **__: str(folder)}), best:
            self.background.save(self._state, save)
        if self._state.best_global_step == self._state.global_step and trainer.args.save_strategy != SaveStrategy.NO:
            # As Trainer does where it is told, and where a folder is there before it looks: FSDP's shards come after.
            self._state.best_model_checkpoint = str(checkpoint_of(trainer.args, self._state))

    def _add(self, args: TrainingArguments, state: TrainerState, session: SaveSession) -> RankState | None:
        """Add this package's state to what Trainer wrote; or give it, where both are captured."""
        assert self._content is not None
        rank = self._content.add(session.folder, args, state, deferred=self.background.captured)
        self.background.begin_part(session)
        if rank is not None:
            self.background.complete(args, state, rank)
        elif self._directory.nodes.leads and state.best_global_step is not None:
            state.save_to_json(str(session.folder / "trainer_state.json"))  # with its final place
        return rank

    def _finish(
        self, args: TrainingArguments, state: TrainerState, session: SaveSession, *, is_captured: bool, is_later: bool
    ) -> None:
        """Commit what is written, or, ``is_later``, have it written, proved and committed by threads."""
        assert self._last is not None
        self._last.handed_over(session.final, self._best_before)
        manifest = _manifest(args, state, attempt=self._attempt, monitor=self._monitor)
        best = [] if state.best_model_checkpoint is None else [self._directory.resolved(state.best_model_checkpoint)]

        def commit(save: Save) -> int:
            return session.commit_written(save, manifest, best)

        if not is_later:
            session.commit(manifest, best)
        elif is_captured:
            session.commit_later(lambda: self.background.hand_over(session, commit))
        elif self.background.has_written:
            session.commit_later(lambda: self.background.prove(session, commit), is_written=True)
        else:
            session.commit_later(None)

    def written_in_place(self, args: TrainingArguments, state: TrainerState) -> Path | None:
        """The checkpoint that was just saved without passing through here; None where there is none such."""
        if self.saved_step == state.global_step:
            return None
        if self._stop_intercepting is not None:
            self._say_in_place("its _save_checkpoint does not call the one of Trainer")
        meant = Path(os.path.abspath(checkpoint_of(args, state)))  # as Trainer has just meant it
        return meant if self._elsewhere is None else self._elsewhere / meant.name

    def finish_in_place(self, final: Path, state: TrainerState) -> None:
        """Tell of a checkpoint that was written in place."""
        self.saved_step, trainer = state.global_step, present_trainer()
        if trainer is not None and trainer.args.should_save:
            self.background.unresumable.look(final, trainer)
        self._directory.saved_in_place(state.global_step, final)

    def on_train_end(self, event: Event) -> None:
        self.settle()
        self._directory.failures.repeat()
        self._directory.finish_copies()

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        self.background.release(args)  # before the lock is given back
        if self._stop_intercepting is not None:
            self._stop_intercepting()
            self._stop_intercepting = None
        give_back(args, "save_total_limit")
        self._directory.close(wait=False)  # after a training that ended there is nothing left to wait for


def _manifest(args: TrainingArguments, state: TrainerState, *, attempt: str, monitor: str | None) -> Manifest:
    """What the manifest of the checkpoint that is being saved says, but for its files."""
    return Manifest(
        attempt=attempt,
        step=state.global_step,
        epoch=float(state.epoch),
        world_size=args.world_size,
        created="",
        metric=_metric(state, monitor or default_monitor(args)),
        files=(),
    )


def _metric(state: TrainerState, monitor: str) -> Metric | None:
    """The metric of these very weights: what was evaluated at another step says nothing of them."""
    for row in reversed(state.log_history):
        if row.get("step") != state.global_step:
            break
        for name in (monitor, f"eval_{monitor}"):
            if isinstance(row.get(name), (int, float)):
                return Metric(name, float(row[name]))
    return None
