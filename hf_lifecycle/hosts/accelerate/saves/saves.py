"""The saves of a loop: where one is possible, in which order it comes to be, and what is waited for.

Promise: every rank does the same in the same order, whether rank 0 writes in the background or not. A save in flight
is waited for by the next one, by the end of the loop, by ``resume()``, by a signal's save and by ``close()``. A
snapshot that was torn is made up for: at the next step's end, or at the epoch's end, all at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_lifecycle.checkpoint.directory.manifest import Manifest, Metric
from hf_lifecycle.checkpoint.files.tree import require_storable
from hf_lifecycle.engine.background_saves import Commit
from hf_lifecycle.engine.load_proof import LoadProof
from hf_lifecycle.engine.run_directory import RunDirectory
from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.errors import UnsupportedTraining
from hf_lifecycle.hosts.accelerate.hooks import Hooks, save_into
from hf_lifecycle.hosts.accelerate.intercept import optimizers_of, without_weights
from hf_lifecycle.hosts.accelerate.iteration.uneven import agreed_step
from hf_lifecycle.hosts.accelerate.loop import Loop
from hf_lifecycle.hosts.accelerate.run_state.outside import Outside
from hf_lifecycle.hosts.accelerate.saves.background import Background
from hf_lifecycle.hosts.accelerate.saves.deepspeed import EngineBackground, is_of_deepspeed
from hf_lifecycle.hosts.accelerate.saves.rank_state import Carried
from hf_lifecycle.hosts.accelerate.saves.save_again import SaveAgain
from hf_lifecycle.hosts.accelerate.saves.sharded import ShardedBackground, is_sharded
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.captured import WrittenSave
from hf_lifecycle.saving.snapshots.state_copies import StateMemory
from hf_lifecycle.state.buckets import Buckets
from hf_lifecycle.state.rng.states import capture_rng

__all__ = ["Saves"]

_Background = Background | ShardedBackground | EngineBackground


class Saves:
    """Makes the saves of one run.

    Args:
        directory: Where checkpoints go; None where the caller saves with ``accelerator.save_state`` alone.
        outside: What is trained beside; its optimizers wait for a snapshot, too.
        buckets: Those in which gradients are summed, which a save starts again.

    Attributes:
        in_loop: Whether a loop of the manager's runs; ``is_closed``: whether everything was given back.
    """

    def __init__(
        self,
        accelerator: Any,
        ranks: Ranks,
        loop: Loop,
        directory: RunDirectory | None,
        proof: LoadProof,
        carried: Carried,
        outside: Outside,
        buckets: Buckets,
        hooks: Hooks,
    ) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self._loop = loop
        self._directory = directory
        self._proof = proof
        self._carried = carried
        self._outside = outside
        self._buckets = buckets
        self._hooks = hooks
        self._save_again = SaveAgain(ranks, loop, proof, carried)  # a signal is heeded after that
        self._background: _Background | None = None
        if directory is not None:
            kinds: Any = {is_sharded: ShardedBackground, is_of_deepspeed: EngineBackground}
            kind = next((one for is_of, one in kinds.items() if is_of(accelerator)), Background)
            self._background = kind(accelerator, directory, hooks)
        self._copies = StateMemory()  # of what this rank adds, for the save that is being written
        self._epoch_is_over: bool | None = None  # what the save that runs was told
        self._in_flight = False  # since save(wait=False); known on every rank
        self._unproved: int | None = None  # the step of that save, until it is known that its snapshot is not torn
        self._saved_at: tuple[int, bool] | None = None  # the step that was saved last, and whether its epoch was over
        self.in_loop = self.is_closed = False
        loop.at_boundary.append(self._at_boundary)
        loop.at_epoch.append(self._at_epoch)
        loop.at_end.append(self.finish)

    def directory(self, what: str) -> RunDirectory:
        """Where checkpoints go.

        Raises:
            ValueError: There is none, which ``what`` needs, or it was given back.
        """
        if self.is_closed:
            raise ValueError(f"{what} after close(): create a new TrainingStateManager")
        if self._directory is None:
            raise ValueError(f"{what} needs a directory: create TrainingStateManager(accelerator, directory)")
        return self._directory

    def during(self, iterator: Iterator[Any]) -> Iterator[Any]:
        """Go through ``iterator``, the outermost loop of the manager's, and wait for the save in flight at its end."""
        self.in_loop = True
        try:
            yield from iterator
        finally:
            self.in_loop = False
            self._save_again.leave()
            if self._background is not None:
                self._background.finish()
        if self._unproved is not None:  # without epochs there is no other place to make up for it
            self._make_up(is_proved=True)
        self._finish_last()

    def save(self, metric: float | None, epoch_is_over: bool | None, *, wait: bool) -> Path:
        """Save a checkpoint of this place of the loop, on every rank."""
        directory, background = self.directory("save()"), self._background
        assert background is not None
        if epoch_is_over is None:
            epoch_is_over = self._loop.epoch_is_over()
        place = self._loop.steps.count, self._loop.progress.epoch + epoch_is_over, epoch_is_over
        with self._ranks.agree(what="save()" if wait else "save(wait=False)") as told:
            told.own = place
            self._refuse_this_place()
            background.settle()
        manifest = Manifest(
            attempt=self._carried.attempt,
            step=agreed_step(told.each),
            epoch=float(place[1]),
            world_size=self._ranks.world_size,
            created="",
            metric=None if metric is None else Metric("metric", float(metric)),
            files=(),
        )
        self._in_flight, self._unproved, self._saved_at = False, None, None
        directory.open()
        session = SaveSession(directory, manifest.step)
        again = functools.partial(self.save, metric, None, wait=wait)
        with self._loop.trying_to_save(), session, self._save_again.trying_to_save(again):
            session.stage()
            self._fill(session, manifest, background, epoch_is_over=epoch_is_over, wait=wait)
        if not wait:
            self._in_flight, self._unproved = True, place[0]
        self._saved_at = place[0], epoch_is_over
        return session.final

    def _fill(
        self,
        session: SaveSession,
        manifest: Manifest,
        background: _Background,
        *,
        epoch_is_over: bool,
        wait: bool,
    ) -> None:
        """Write what is staged, and commit it or let it be committed."""
        commit = functools.partial(session.commit_written, manifest=manifest)
        self._epoch_is_over = epoch_is_over
        try:
            with session.writing() as told:
                left = self._write(background, session, wait=wait)
                if left is not None:
                    told.own = "later"
                    background.begin_part(session)
                if self._ranks.is_main:  # of a captured save, the optimizers' files are still to come
                    background.files.look_at_files(session.folder, "optimizer*.bin", "scheduler*.bin")
        finally:
            self._epoch_is_over = None
        if not any(told.each):
            session.commit(manifest)
        elif isinstance(left, WrittenSave):
            session.commit_later(lambda: background.prove(session, self._proof.digests, commit), is_written=True)
        else:
            session.commit_later(None if left is None else functools.partial(left, commit))
        background.begin_writing()

    def _write(
        self, background: _Background, session: SaveSession, *, wait: bool
    ) -> WrittenSave | Callable[[Commit], object] | None:
        """Let accelerate save. Returns what is left to be proved, or what lets this rank's part be written, if any."""

        def save() -> None:
            save_into(self._accelerator, session.folder)

        if wait or not background.is_made_here:
            save()
            return None
        present: Any = background.prepare()
        if present is None:
            with background.watching():
                save()
            written = background.learn_from(session)
            if written is not None:
                self._let_steps_wait(background)
            return written
        tree = self._tree(lambda: self._proof.defer(present.named()), is_captured=True)
        weights, tree["parts"]["weights"] = tree["parts"]["weights"], None
        settled = self._copies.copy_of(tree)
        require_storable(settled)  # what cannot be stored is refused here, not in the background
        with self._hooks.deferred(tree["identity"]):
            self._let_steps_wait(background)
            captured: Any = background.captured(session, present, overlap=self.in_loop, weights=weights, tree=settled)
            with without_weights(self._accelerator):
                save()
        return lambda commit: background.hand_over(captured, session, commit)

    def _let_steps_wait(self, background: _Background) -> None:
        background.overlap.wait_before([*optimizers_of(self._accelerator), *self._outside.optimizers])

    def tree_to_save(self) -> dict[str, Any]:
        """Everything that this rank adds to a checkpoint."""
        return self._tree(self._proof.state_dict)

    def _tree(self, weights: Callable[[], Any], *, is_captured: bool = False) -> dict[str, Any]:
        self._refuse_this_place()
        over = self._loop.epoch_is_over() if self._epoch_is_over is None else self._epoch_is_over
        rng = capture_rng()
        self._proof.begin_save("comparing the buffers of the models")
        state = self._carried.state(weights, epoch_is_over=over)
        tree = self._carried.tree(state, rng)
        self._loop.was_captured(rng, epoch_is_over=over)
        self._save_again.captured(state, epoch_is_over=over, is_captured=is_captured)
        self._buckets.begin_anew()
        return tree

    def _refuse_this_place(self) -> None:
        problem = self._loop.obstacle_to_saving()
        if problem is not None:
            raise UnsupportedTraining([problem])

    # Saves that nobody asked for

    def is_saved(self) -> bool:
        """Whether this very place is saved, and whole; on every rank. A save into another folder is none."""
        if self._saved_at != (self._loop.steps.count, self._loop.epoch_is_over()):
            return False
        if not self._in_flight:
            return True
        assert self._background is not None
        self._in_flight, self._unproved = False, None
        whole: bool = self._ranks.broadcast(self._background.is_whole(), what="whether the last save is complete")
        return whole

    def save_here(self) -> None:
        """Save this place, where the uninterrupted run may make no save: training's random numbers do not depend on it.

        A save before, in the background, that failed has said so; it must not cost this one.
        """
        assert self._background is not None
        self._background.is_whole()
        self._loop.interrupting = not self._loop.return_to_saved()
        try:
            self.save(None, None, wait=True)
        finally:
            self._loop.interrupting = False
            self._save_again.forget()  # the body is done

    def _at_boundary(self) -> None:
        if self._unproved is not None and self._loop.steps.count > self._unproved:
            self._make_up(is_proved=True)

    def _at_epoch(self) -> None:
        if self._unproved is not None:
            self._make_up(is_proved=self._loop.steps.count > self._unproved)

    def _make_up(self, *, is_proved: bool) -> None:
        """Save this place where the last snapshot is torn. ``is_proved``: nothing can tear it any more."""
        assert self._background is not None
        torn = any(self._ranks.gather(self._background.torn_so_far(), what="whether a failed save is repeated"))
        if torn and self._loop.obstacle_to_saving() is None:
            self.save_here()
        elif not torn and is_proved:
            self._unproved = None

    # What is in flight

    def finish(self) -> None:
        """Wait for the save in flight, on every rank, and give the snapshot's memory back.

        Raises:
            SaveFailed: It went wrong. On other ranks than the first: ``RankFailed``.
        """
        try:
            self._finish_last()
        finally:
            self._copies.release()
            if self._background is not None:
                self._background.overlap.release()

    def _finish_last(self) -> None:
        if self._background is not None and self._in_flight:
            self._in_flight, self._unproved = False, None
            with self._ranks.agree(what="finishing the last save"):
                self._background.require_whole()

    def before_loading(self) -> None:
        """Wait for the save in flight: what it reads is about to be replaced. No place of what comes is saved."""
        self._unproved = self._saved_at = None
        self._save_again.forget()
        if self._background is not None:
            self._background.finish()

    def close(self) -> None:
        """Wait for the save in flight, and give everything back.

        Raises:
            SaveFailed: It went wrong.
        """
        if self._background is None:
            return
        try:
            if self._in_flight:
                self._in_flight = False
                self._background.require_whole()
        finally:
            self._copies.release()
            self._background.close()
