"""What this package adds to a checkpoint of Trainer's: one state file for each rank, in ``checkpoint-N/lifecycle/``.

The rest of the directory is Trainer's own. Without this package, Trainer resumes from it all the same.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.files.additions import TRAINER, marked, rank_file
from hf_lifecycle.checkpoint.files.statefile import write_tree
from hf_lifecycle.checkpoint.files.tree import require_storable
from hf_lifecycle.engine.resume_report import saved_by_version
from hf_lifecycle.errors import StateMismatch
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.method_patching import MethodPatches
from hf_lifecycle.hosts.trainer.resume.source import ResumeSource, identity, set_mark
from hf_lifecycle.hosts.trainer.resume.weights import Weights
from hf_lifecycle.hosts.trainer.run_state.data_objects import DataState
from hf_lifecycle.hosts.trainer.saves.deferred import RankState
from hf_lifecycle.hosts.trainer.saves.staging import Staging
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.snapshots.state_copies import StateMemory
from hf_lifecycle.state.objects import Stateful, left_to_rank_0, restore_objects, states_to_save

__all__ = ["Checkpoints"]

logger = logging.getLogger(__name__)


class Checkpoints(Component):
    """Writes the state of all parts and of the user's objects at each save.

    Args:
        data: Those among them that take part in making batches, and are ahead of training.

    Attributes:
        attempt: The name of this call of ``train()``.
    """

    key = "checkpoints"

    def __init__(
        self,
        parts: Sequence[Component],
        objects: Mapping[str, Stateful],
        data: DataState,
        staging: Staging,
        ranks: Ranks,
    ) -> None:
        self._parts = parts
        self._objects = objects
        self._data = data
        self._staging = staging
        self._ranks = ranks
        told = ranks.gather([uuid.uuid4().hex, bool(objects)], what="naming this training")
        self.attempt: str = told[0][0]
        self._any_has_objects = any(has_some for _, has_some in told)
        self._facts: dict[str, Any] = {}
        self._ours = MethodPatches()
        self._signed: TrainerControl | None = None
        self._copies = StateMemory()  # of the objects' states, for the save that is being written

    def prepare(
        self, args: TrainingArguments, state: TrainerState, facts: dict[str, Any], resumed_from: Path | None
    ) -> None:
        """``facts``: what the run is like (environment, arguments, data), saved with every checkpoint.

        Raises:
            DirectoryInUse: Another process trains into the output directory.
        """
        self._facts = facts
        self._staging.prepare(args, state, self.attempt, resumed_from, self)
        set_mark(state, self.attempt)

    @property
    def restored(self) -> list[str]:
        """The names of what a checkpoint gives back."""
        return [part.key.replace("_", " ") for part in self._parts] + [f"objects: {name}" for name in self._objects]

    def restore(self, origin: ResumeSource, *, leave_out: Collection[str] = ()) -> list[str]:
        """Give every part and object its state back. Returns the names of objects that one side does not have.

        Args:
            leave_out: Keys of parts whose state belongs to ranks that there are no more.

        Raises:
            StateMismatch: A part's state does not have the keys it should have.
            ResumeMismatch: That is so since another version of this package saved it.
        """
        saved_parts, saved_objects = origin.saved["parts"], origin.saved["objects"]
        with saved_by_version(origin.path, origin.saved["environment"]):
            missing = [part.key for part in self._parts if part.key not in saved_parts]
            if missing:
                raise StateMismatch(str(rank_file(origin.path, 0)), missing=missing)
            for part in self._parts:
                if part.key not in leave_out:
                    part.load_state_dict(saved_parts[part.key])
        return restore_objects(self._objects, saved_objects)

    def on_train_begin(self, event: Event) -> None:
        self._sign(event.control, event.state)

    def _sign(self, control: TrainerControl, state: TrainerState) -> None:
        """Trainer asks for the state of its control at each save, and puts that in the place of what it has."""

        def state_of_control(own: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
            return lambda: marked(own(), identity(self.attempt, state.global_step))

        if control is not self._signed:  # a callback may return another than it was given
            self._signed = control
            self._ours.replace(control, "state", state_of_control)

    def on_step_end(self, event: Event) -> None:
        self._sign(event.control, event.state)
        set_mark(event.state, self.attempt)

    def on_epoch_end(self, event: Event) -> None:
        self._sign(event.control, event.state)

    @contextmanager
    def of_one_moment(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> Iterator[None]:
        """Within it a save runs, which may have been asked for at any moment, and which training does not notice."""
        self._sign(control, state)
        for part in self._parts:
            part.before_save(args, state)
        set_mark(state, self.attempt)
        try:
            yield
        finally:
            for part in self._parts:
                part.after_save(args, state)

    def add(self, staged: Path, args: TrainingArguments, state: TrainerState, *, deferred: bool) -> RankState | None:
        """Write this rank's state into ``staged``; or, ``deferred``, capture it to be written later."""
        if deferred:
            return self._deferred_state(staged, args, state)
        self._add_state(staged, args, state)
        return None

    def on_save(self, event: Event) -> None:
        if event.state.is_hyper_param_search:  # its trials have folders that no event names
            return
        checkpoint = self._staging.written_in_place(event.args, event.state)
        if checkpoint is None:
            return
        if not self._ranks.broadcast(checkpoint.is_dir(), what="looking for the checkpoint that Trainer saved"):
            logger.warning("%s: does not exist after the save, so no state can be added to it", checkpoint)
            return
        with (
            self.of_one_moment(event.args, event.state, event.control),
            self._ranks.agree(what=f"writing the state of each rank at step {event.state.global_step}"),
        ):
            self._add_state(checkpoint, event.args, event.state, in_place=True)
        self._staging.finish_in_place(checkpoint, event.state)

    def _tree(self, state: TrainerState, parts: Iterable[Component], *, in_place: bool = False) -> dict[str, Any]:
        """What is added, with the states of these parts; ``in_place``: the ranks may have no directory in common."""
        states = states_to_save(self._objects, self._data.states_at_place())
        shared = left_to_rank_0(states, self._ranks) if self._any_has_objects and not in_place else []
        return {
            "identity": identity(self.attempt, state.global_step),
            **self._facts,
            "parts": {part.key: part.state_dict() for part in parts},
            "objects": {name: one for name, one in states.items() if name not in shared},
            "shared": shared,
        }

    def _deferred_state(self, checkpoint: Path, args: TrainingArguments, state: TrainerState) -> RankState:
        """What is added, captured now and written later; the weights' digests come from the snapshot."""
        tree = self._tree(state, (part for part in self._parts if not isinstance(part, Weights)))
        tree["objects"] = self._copies.copy_of(tree["objects"])
        require_storable({"objects": tree["objects"]})  # what cannot be stored is refused here, not in the background
        return RankState(rank_file(checkpoint, args.process_index), tree, TRAINER, Weights.key)

    def _add_state(
        self, checkpoint: Path, args: TrainingArguments, state: TrainerState, *, in_place: bool = False
    ) -> None:
        tree, file = self._tree(state, self._parts, in_place=in_place), rank_file(checkpoint, args.process_index)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tree(file, tree, kind=TRAINER)

    def release(self, args: TrainingArguments) -> None:
        self._ours.put_back()
        self._signed = None
        self._copies.release()
