"""What Trainer loaded is what was saved: proved tensor by tensor, repaired where it is not, refused where it cannot be.

The proof is :class:`~hf_lifecycle.engine.load_proof.LoadProof`, and the model's is taken once more after
``load_best_model_at_end``. Saved with us are also parameters that no file of Trainer's holds, and gradients that an
epoch's end left over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.engine.deferred_proof import DeferredProof
from hf_lifecycle.engine.load_proof import LoadProof, Repair, Trained
from hf_lifecycle.engine.resharding import gradients_of_all
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.hosts.trainer.component import Component, Event
from hf_lifecycle.hosts.trainer.resume import repair
from hf_lifecycle.hosts.trainer.resume.source import saved_for
from hf_lifecycle.hosts.trainer.run_state.adapter_merging import AdapterMerging
from hf_lifecycle.hosts.trainer.run_state.moment import SaveMoment
from hf_lifecycle.hosts.trainer.run_state.position import Position
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.snapshots.live import host_copy
from hf_lifecycle.saving.snapshots.snapshot import Watch
from hf_lifecycle.state.buckets import Buckets
from hf_lifecycle.state.fingerprint import local_part, module_tensors, part_like
from hf_lifecycle.state.proof import Proof, unwrapped
from hf_lifecycle.state.replicas import put_back_buffers

__all__ = ["Weights"]


class Weights(Component):
    """Digests at the save, proof at the resume.

    Args:
        position: Tells whether a save is made in the middle of a step.
        merging: Tells whether adapters are merged only while it is made.

    Attributes:
        moment: That of each save.
    """

    key = "weights"

    def __init__(self, ranks: Ranks, position: Position, merging: AdapterMerging) -> None:
        self._ranks = ranks
        self._position = position
        self._proof = LoadProof(ranks, TRAINER, self._trained)
        self._unfiled: list[str] = []  # the trained parameters that no file of the host's holds
        self._saved: Mapping[str, Any] | None = None
        self._live: tuple[Any, Any, Any] = (None, None, None)
        self.moment = SaveMoment(position)
        self._merging = merging
        self._buckets = Buckets()

    def _trained(self) -> Trained:
        model, optimizer, scheduler = self._live
        kind = getattr(getattr(optimizer, "accelerator_state", None), "distributed_type", None)
        schedulers = {} if scheduler is None else {"scheduler": scheduler}
        return Trained({"": model}, {"optimizer": optimizer}, schedulers, getattr(optimizer, "scaler", None), kind)

    @property
    def digests(self) -> Mapping[str, str]:
        """Those of model and optimizer, at the last save that Trainer made itself."""
        return self._proof.digests

    def state_dict(self) -> dict[str, Any]:
        model = self._live[0]
        unfiled = [*repair.unfiled_parameters(model), *self.moment.moved()]
        self._unfiled = list(module_tensors(model)) if self.moment.is_of_another_model else unfiled
        return {**self._proof.state_dict(self._unfiled), "gradients": self._gradients(model.named_parameters())}

    def obstacle(self) -> str | None:
        """Why the save under way cannot be made from a snapshot."""
        if self.moment.is_of_another_model:
            return "trainer.model is not the model that is trained"
        if self.moment.moved():
            return "frozen weights or buffers under an adapter change, as by merge_adapter() or BatchNorm"
        return None

    def defer(self, live: Mapping[str, torch.Tensor], watch: Watch) -> DeferredProof:
        """Capture the state of this moment, but for what a snapshot of the model and the optimizer has.

        Args:
            watch: Sees which of them change from this moment on.
        """
        parameters = {name: one for name, one in live.items() if isinstance(one, torch.nn.Parameter)}
        self.moment.captured(watch, parameters)
        return self._proof.defer({"": live}, self._unfiled, gradients=self._gradients(parameters.items()))

    def _gradients(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What a stream that ended within an optimizer step left for the next one; empty at any other save."""
        if self._position.mid_step:  # this step's own, which a resumed run computes again
            return {}
        return {name: host_copy(local_part(one.grad)) for name, one in parameters if one.grad is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "model", "optimizer", "scheduler", "scaler", "buffers", "gradients")
        self._saved = state

    def prepare(self, model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Remember what is trained, as it was made."""
        self._live = unwrapped(model), optimizer, scheduler
        self.moment.prepare(self._live[0], optimizer)
        self._buckets.watch(self._live[0])
        self._proof.watch()

    def require_reshardable(self, checkpoint: Path) -> None:
        """Raise ``ResumeMismatch`` where what other ranks saved cannot be verified."""
        if (problem := self._proof.obstacle_to_resharding()) is not None:
            raise ResumeMismatch(checkpoint, [problem], "resume with as many processes as saved it")

    def prove(
        self, checkpoint: Path, *, saved_by: int | None = None, model_only: bool = False
    ) -> tuple[Proof, list[str]]:
        """Compare the live state with the digests saved; repair what differs.

        Args:
            model_only: Whether it holds no optimizer, and the live one is new.

        Returns:
            What was proved, and what differs and could not be repaired.
        """
        assert self._saved is not None
        self._put_back_gradients(checkpoint, saved_by)
        proof, problems = self._proof.prove(
            self._saved,
            checkpoint,
            left_out=("optimizer", "scheduler", "scaler") if model_only else (),
            repair=self._repair(checkpoint),
            optimizer_files={"optimizer": checkpoint / "optimizer.pt"},
            saved_by=saved_by,
        )
        self.moment.resumed()
        return proof, problems

    def _put_back_gradients(self, checkpoint: Path, saved_by: int | None) -> None:
        assert self._saved is not None
        saved, ranks = self._saved["gradients"], self._ranks
        if not saved:
            return
        parameters = dict(self._live[0].named_parameters())
        if saved_by not in (None, ranks.world_size):
            trees = (read_tree(rank_file(checkpoint, rank), kind=TRAINER) for rank in range(saved_by))
            each = [tree["parts"][self.key]["gradients"] for tree in trees]
            saved = gradients_of_all(each, parameters, ranks.rank, ranks.world_size)
        for name, value in saved.items():
            if name in parameters:
                parameters[name].grad = part_like(value.to(parameters[name].device), parameters[name])

    def _repair(self, checkpoint: Path) -> Repair:
        model = self._live[0]
        return lambda lost: repair.model_from_checkpoint(model, checkpoint, lost)

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self.moment.saved(is_undone=self._merging.only_for_save)  # by a resumed run as well

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        self.moment.begin_step(state.global_step)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._buckets.begin_anew()  # as a resumed run does, which takes its first step after this
        self.moment.look(state.global_step)
        self._proof.begin_save(f"comparing buffers at step {state.global_step}")

    def on_train_end(self, event: Event) -> None:
        if not event.args.load_best_model_at_end or event.state.best_model_checkpoint is None:
            return
        best = Path(event.state.best_model_checkpoint)
        tree = saved_for(best, event.args.process_index, event.args.world_size)
        if tree is None:
            return  # saved by stock Trainer: there is no proof to hold it to
        model = self._live[0]
        kept = model.state_dict().keys()
        saved_by = tree["environment"]["world_size"]
        shards = self._proof.shards_of(best, saved_by, tree["parts"][self.key])
        part = self._proof.whole(tree["parts"][self.key], best)
        if part["model"].keys() <= part["buffers"].keys():
            return  # Trainer saved another model, which nothing proves
        put_back_buffers(model, {name: buffer for name, buffer in part["buffers"].items() if name in kept})
        saved = {name: digest for name, digest in part["model"].items() if name in kept}
        problems, _ = self._proof.prove_model(saved, best, self._repair(best), shards)
        if problems:
            raise ResumeMismatch(best, problems, "load_best_model_at_end did not restore the best weights")

    def release(self, args: TrainingArguments) -> None:
        self.moment.close()
