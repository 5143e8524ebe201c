"""Saves that a loop goes on over: captured where ``save(wait=False)`` stands, and written by a thread.

The first of them is accelerate's own: it is the template, and a thread compares it with what it was made of, and
commits it. From then on ``accelerator.save_state`` still runs, with no models and no optimizers to write: so its small
files are accelerate's, of this very moment. Tensors go into a snapshot that is copied while the next forward and
backward run; every optimizer's step waits for it. Where a template cannot be had, every save waits, and one line says
why.

On rank 0 alone. Invariant: nothing here is an exchange with other ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from hf_lifecycle.accelerator.deferred import DeferredSave
from hf_lifecycle.accelerator.template import (
    Live,
    OptimizerState,
    Template,
    ingredients,
    live_models,
    obstacle_to,
    optimizer_states,
    template_of,
)
from hf_lifecycle.accelerator.trained import DeferredTrained
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import SaveFailed
from hf_lifecycle.saving.captured import Save, SnapshotTorn, WrittenSave, prove_and_commit, write_and_commit
from hf_lifecycle.saving.collecting import collecting_later
from hf_lifecycle.saving.direct import Blocks
from hf_lifecycle.saving.layout import NotLearned
from hf_lifecycle.saving.overlap import Overlap
from hf_lifecycle.saving.snapshot import LiveTensor
from hf_lifecycle.saving.writer import Writer

__all__ = ["Background", "Present"]

logger = logging.getLogger("hf_lifecycle")

_MOST_TRIES = 3  # saves to learn from, where tensors could not be told apart


class Present(NamedTuple):
    """What a save finds.

    Attributes:
        models: The tensors of each model.
        optimizers: The state of each optimizer.
        tensors: All that a snapshot consists of.
    """

    models: list[Live]
    optimizers: list[OptimizerState]
    tensors: list[LiveTensor]


class Background:
    """Makes a loop's saves in the background, where that is proved to give what accelerate would have written.

    Args:
        accelerator: The loop's accelerator.
        directory: Is told of each save.
        beside: Gives the optimizers that step beside those that the accelerator prepared.
    """

    def __init__(self, accelerator: Any, directory: RunDirectory, beside: Callable[[], Iterable[Any]]) -> None:
        self._accelerator = accelerator
        self._directory = directory
        self._beside = beside
        self._is_left_to_accelerate = False
        self._template: Template | None = None
        self._tries = 0
        self._overlap = Overlap()
        self._writer = Writer()
        self._waited = 0.0  # seconds for which the next save has waited for the one before
        self._is_whole = True  # whether the last save is committed, once it is settled
        self._given_up: SaveFailed | None = None  # that it was torn
        self._written: WrittenSave | None = None  # of accelerate's own files, if the last save was such
        self._at_once = False  # a template cannot be proved by names and digests

    def prepare(self) -> Present | None:
        """What there is to be captured, where the save that is due can be; None where accelerate is to make it."""
        self._is_whole, self._given_up = True, None
        written, self._written = self._written, None
        if written is not None and not written.is_proved:
            self._template, self._at_once = None, written.obstacle is not None
            logger.info("this save is accelerate's own again: %s", written.obstacle or "the last one failed")
            self._overlap.release()
        if self._is_left_to_accelerate or self._template is None:
            return None
        reason = obstacle_to(self._accelerator) or self._overlap.obstacle()
        if reason is not None:
            self._leave_to_accelerate(reason)
            return None
        models = live_models(self._accelerator)
        try:
            if self._template.ingredients != ingredients(self._accelerator, models):
                logger.info("what is trained has changed: this save is accelerate's own, and the new template")
                self._template, self._tries = None, 0
                return None
            present = self._present(self._template, models)
        except NotLearned as error:
            self._leave_to_accelerate(str(error))
            return None
        template = self._template
        no_room = self._overlap.make_room(present.tensors, lambda: template.plans(present.models, present.optimizers))
        if no_room is not None:
            self._leave_to_accelerate(no_room)
            return None
        return present

    def _present(self, template: Template, models: list[Live]) -> Present:
        with collecting_later():
            optimizers = optimizer_states(self._accelerator)
            return Present(models, optimizers, template.tensors(models, optimizers))

    def _leave_to_accelerate(self, reason: str) -> None:
        self._is_left_to_accelerate, self._template = True, None
        logger.warning("save(wait=False) waits until all is written, as save() does: %s", reason)

    def learn(self, session: SaveSession) -> WrittenSave | None:
        """Learn from what accelerate has just written. Returns what :meth:`prove` takes, if it is a template."""
        if self._is_left_to_accelerate:
            return None
        reason = obstacle_to(self._accelerator)
        if reason is not None:
            self._leave_to_accelerate(reason)
            return None
        self._tries += 1
        try:
            self._template, comparisons = template_of(self._accelerator, session.folder, at_once=self._at_once)
            present = self._present(self._template, live_models(self._accelerator))
        except NotLearned as error:
            self._template = None
            if not error.ambiguous or self._tries >= _MOST_TRIES:
                self._leave_to_accelerate(str(error))
            return None
        self._overlap.wait_before([*self._accelerator._optimizers, *self._beside()])
        plans = self._template.plans(present.models, present.optimizers)
        no_room = self._overlap.prepare(present.tensors, plans)
        if no_room is not None:
            self._leave_to_accelerate(no_room)
            return None
        self._written = WrittenSave(step=session.step, asked=session.began, comparisons=comparisons)
        return self._written

    def prove(
        self, save: WrittenSave, session: SaveSession, digests: Mapping[str, str], commit: Callable[[Save], int]
    ) -> None:
        """Let what accelerate has written be proved and committed, now that every rank has written its part.

        Args:
            save: From :meth:`learn`.
            session: Its place.
            digests: Those of the tensors that it was made of.
            commit: Commits it, on the writer's thread. Returns the bytes of the checkpoint.
        """
        self._is_whole, save.digests = False, digests

        def work(_: Blocks) -> None:
            prove_and_commit(save, session.folder, lambda: commit(save), self._directory.tell)
            self._is_whole = True

        self._start(save, session, work)

    def _start(self, save: Save, session: SaveSession, work: Callable[[Blocks], object]) -> None:
        save.stall += time.monotonic() - save.asked  # before there is a thread that reads it
        self._writer.start(work, session.final.name, session.final.parent)

    def capture(
        self,
        session: SaveSession,
        present: Present,
        weights: DeferredTrained,
        tree: dict[str, Any],
        save: Callable[[], object],
        *,
        overlap: bool,
    ) -> DeferredSave:
        """Capture a save at this moment.

        Args:
            session: Its place.
            present: What :meth:`prepare` gave.
            weights: The part of this rank's tree that is completed from the snapshot.
            tree: The rest of it. Nobody else has it.
            save: Lets accelerate save into that place.
            overlap: Whether a loop of the manager's goes on, so that the next step is waited for.

        Returns:
            What :meth:`hand_over` takes.
        """
        assert self._template is not None
        waited, self._waited = self._waited, 0.0
        self._directory.tell("asked", session.step, waited_seconds=waited)
        self._overlap.wait_before([*self._accelerator._optimizers, *self._beside()])
        with collecting_later():
            snapshot = self._overlap.take(present.tensors, overlap=overlap)
        captured = DeferredSave(
            step=session.step,
            snapshot=snapshot,
            asked=session.began,
            stall=waited,
            template=self._template,
            optimizers=present.optimizers,
            weights=weights,
            tree=tree,
        )
        self._overlap.guard(captured)
        with _without_weights(self._accelerator):
            save()
        return captured

    def hand_over(self, save: DeferredSave, session: SaveSession, commit: Callable[[Save], int]) -> None:
        """Let the captured save be written and committed, now that every rank has written its part."""
        self._is_whole = False

        def work(blocks: Blocks) -> None:
            size = write_and_commit(
                save,
                session.folder,
                write=lambda: save.write(session.folder, blocks),
                commit=lambda: commit(save),
                tell=self._directory.tell,
            )
            self._is_whole = size is not None
            if size is None:
                self._given_up = SaveFailed(session.final.name, SnapshotTorn(save.snapshot.torn))

        self._start(save, session, work)

    def torn_so_far(self) -> bool:
        """Whether the last snapshot is torn, as far as that can be told without holding training up."""
        return self._given_up is not None or self._overlap.torn_so_far()

    def settle(self) -> None:
        """Wait for the save in flight.

        Raises:
            SaveFailed: It went wrong.
        """
        try:
            self._waited += self._writer.wait()
        finally:
            self._overlap.settle()

    def require_whole(self) -> None:
        """Wait for the save in flight, which no other makes up for.

        Raises:
            SaveFailed: It went wrong, or its snapshot was torn.
        """
        self.settle()
        if self._given_up is not None:
            raise self._given_up

    def is_whole(self) -> bool:
        """Wait for the save in flight. Returns whether it is committed; if not, it was told why."""
        try:
            self.settle()
        except SaveFailed:
            return False
        return self._is_whole

    def join(self) -> None:
        """Wait for the save in flight, and leave what went wrong to :meth:`settle`."""
        self._writer.join()
        self._overlap.settle()

    def release(self) -> None:
        """Give the snapshot's memory back; nothing is in flight."""
        self._overlap.release()

    def close(self) -> None:
        """Wait for the save in flight, and give everything back.

        Raises:
            SaveFailed: It went wrong.
        """
        try:
            self.settle()
        finally:
            self._overlap.close()


@contextmanager
def _without_weights(accelerator: Any) -> Iterator[None]:
    """Let ``accelerator.save_state`` find no models and no optimizers within the block."""
    models, optimizers = accelerator._models, accelerator._optimizers
    accelerator._models, accelerator._optimizers = [], []
    try:
        yield
    finally:
        accelerator._models, accelerator._optimizers = models, optimizers
