"""What Trainer loaded is what was saved: proved tensor by tensor, repaired where it is not, refused where it cannot be.

Digests of model, optimizer, scheduler and scaler are stored at the save and compared with the live state after Trainer
has loaded, and the model's once more after ``load_best_model_at_end``. Buffers that ``state_dict()`` leaves out are
saved with us where training changed them, and so are those that are not alike on all ranks, of which Trainer saves one
rank's; so are gradients that an epoch's end left over.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lifecycle.checkpoint.files.additions import TRAINER, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.errors import ResumeMismatch
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.saving.live import host_copy
from hf_lifecycle.saving.snapshot import Snapshot
from hf_lifecycle.state.buckets import Buckets
from hf_lifecycle.state.buffers import put_back_buffers, unlike_buffers, unsaved_buffer_digests
from hf_lifecycle.state.fingerprint import (
    FrozenDigests,
    digest_of,
    is_shared_out,
    leaf_digests,
    local_part,
    module_tensors,
    part_like,
    tensor_digest,
)
from hf_lifecycle.state.proof import (
    Proof,
    beside_digests,
    describe_differing,
    differing,
    unwrapped,
)
from hf_lifecycle.state.replicas import is_replica, optimizer_samples, tensor_samples, unlike_rank_0, whole_digests
from hf_lifecycle.trainer import repair
from hf_lifecycle.trainer.part import Part
from hf_lifecycle.trainer.position import Position
from hf_lifecycle.trainer.save_moment import SaveMoment

__all__ = ["DeferredWeights", "Weights"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DeferredWeights:
    """What :meth:`Weights.state_dict` would have given at one moment, to be completed from a snapshot of that moment.

    Attributes:
        names: The model's parameters and buffers, in their order.
        frozen: The digests of those that need no gradient, or themselves; of use where they are not in the snapshot.
        unsaved: The buffers that ``state_dict()`` leaves out, with the digest that the constructor's had.
        beside: The digests of scheduler and scaler.
        gradients: What was left over of them.
        unfiled: The trained parameters that no file of the host's holds.
    """

    names: tuple[str, ...]
    frozen: Mapping[str, str | torch.Tensor]
    unsaved: Mapping[str, str | None]
    beside: Mapping[str, Mapping[str, str]]
    gradients: Mapping[str, torch.Tensor]
    unfiled: Sequence[str] = ()

    def tree(self, snapshot: Snapshot, optimizer: Any) -> dict[str, Any]:
        """The state, with the digests of the tensors in the snapshot; ``optimizer`` is its state's live tree."""
        digests = {
            name: tensor_digest(snapshot.named(name)) if snapshot.has(name) else digest_of(self.frozen[name])
            for name in self.names
        }
        changed = [name for name, digest in self.unsaved.items() if digest != digests[name]]
        changed += self.unfiled
        return {
            "model": digests,
            "optimizer": leaf_digests(snapshot.tree(optimizer), "optimizer"),
            **self.beside,
            "buffers": {name: snapshot.named(name).clone() for name in changed},
            "gradients": dict(self.gradients),
        }


class Weights(Part):
    """Digests at the save, proof at the resume.

    Args:
        ranks: The processes of the training.
        position: Tells whether a save is made in the middle of a step.
    """

    key = "weights"

    def __init__(self, ranks: Ranks, position: Position) -> None:
        self._ranks = ranks
        self._position = position
        self._unlike: list[str] = []  # the buffers that are not alike on all ranks, at the save under way
        self._unfiled: list[str] = []  # the trained parameters that no file of the host's holds
        self.digests: Mapping[str, str] = {}  # of model and optimizer, at the last save that Trainer made itself
        self._digests = FrozenDigests()
        self._saved: Mapping[str, Any] | None = None
        self._unsaved_buffers: dict[str, str] = {}  # outside state_dict(), as the constructor made them
        self._live: tuple[Any, Any, Any] = (None, None, None)
        self._moment = SaveMoment(position)
        self._buckets = Buckets()
        self._kept: dict[str, bool] = {}  # the model's buffers, and whether state_dict() has them

    def state_dict(self) -> dict[str, Any]:
        model, optimizer, scheduler = self._live
        tensors = module_tensors(model)
        changed = {
            name: tensors[name].detach().clone()
            for name, digest in unsaved_buffer_digests(model).items()
            if digest != self._unsaved_buffers.get(name)
        }
        unfiled = [*repair.unfiled_parameters(model), *self._moment.moved()]
        self._unfiled = list(tensors) if self._moment.is_of_another_model else unfiled
        changed |= {name: tensors[name].detach().clone() for name in (*self._unlike, *self._unfiled)}
        of_both = self._of_model_and_optimizer()
        self.digests = of_both["model"] | of_both["optimizer"]
        return {
            **of_both,
            **_digests_beside(optimizer, scheduler, small=True),
            "buffers": changed,
            "gradients": self._gradients(model.named_parameters()),
        }

    def _of_model_and_optimizer(self) -> dict[str, dict[str, str]]:
        model, optimizer, _ = self._live
        state = optimizer.state_dict()
        if self._is_replica():
            return {"model": tensor_samples(model), "optimizer": optimizer_samples(state, "optimizer")}
        return {"model": self._digests.of(model), "optimizer": leaf_digests(state, "optimizer")}

    def _is_replica(self) -> bool:
        model, optimizer, _ = self._live
        accelerate_state = getattr(optimizer, "accelerator_state", None)
        return is_replica(self._ranks, getattr(accelerate_state, "distributed_type", None), model)

    def obstacle(self) -> str | None:
        """Why the save under way cannot be made from a snapshot."""
        if self._moment.is_of_another_model:
            return "trainer.model is another one at the save than the one that is trained"
        if self._moment.moved():
            return "frozen weights under an adapter are changed, as merge_adapter() does"
        return None

    def defer(self, live: Mapping[str, torch.Tensor]) -> DeferredWeights:
        """Capture the state of this moment, but for what a snapshot of the model and the optimizer has.

        Args:
            live: The model's parameters and buffers, by each of their names.
        """
        model, optimizer, scheduler = self._live
        first = {id(tensor): name for name, tensor in reversed(list(live.items()))}
        named = {name: tensor for name, tensor in live.items() if first[id(tensor)] == name}
        parameters = {name: one for name, one in named.items() if isinstance(one, torch.nn.Parameter)}
        buffers = [name for name in named if name not in parameters]
        if buffers != list(self._kept):  # which are kept is asked once: a state_dict() takes its time
            state = model.state_dict().keys()
            self._kept = {name: name in state for name in buffers}
        return DeferredWeights(
            names=(*parameters, *buffers),
            frozen=self._digests.frozen(parameters),
            unsaved={name: self._unsaved_buffers.get(name) for name, kept in self._kept.items() if not kept},
            beside=_digests_beside(optimizer, scheduler, small=True),
            gradients=self._gradients(parameters.items()),
            unfiled=self._unfiled,
        )

    def _gradients(self, parameters: Iterable[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What a stream that ended within an optimizer step left for the next one; empty at any other save."""
        if self._position.mid_step:  # this step's own, which a resumed run computes again
            return {}
        return {name: host_copy(local_part(one.grad)) for name, one in parameters if one.grad is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.check_keys(state, "model", "optimizer", "scheduler", "scaler", "buffers", "gradients")
        self._saved = state
        for name in state["buffers"]:  # a trainer that trained before has them already; a new one must find them again
            self._unsaved_buffers.pop(name, None)

    def prepare(self, model: torch.nn.Module, optimizer: Any, scheduler: Any) -> None:
        """Remember what is trained, as it was made."""
        self._live = unwrapped(model), optimizer, scheduler
        self._moment.prepare(self._live[0], optimizer)
        self._buckets.watch(self._live[0])
        self._unsaved_buffers = unsaved_buffer_digests(self._live[0])

    def require_whole_model(self, checkpoint: Path) -> None:
        """Raise ``ResumeMismatch`` where each rank has a part: with other ranks, none has what its digests are of."""
        if any(is_shared_out(tensor) for tensor in module_tensors(self._live[0]).values()):
            raise ResumeMismatch(
                checkpoint,
                ["the model is shared out over the ranks: other ranks would have other parts, which nothing proves"],
                "go on with as many processes as saved it",
            )

    def prove(self, checkpoint: Path, *, model_only: bool = False) -> tuple[Proof, list[str]]:
        """Compare the live state with the digests saved; repair what differs.

        Args:
            checkpoint: What was loaded.
            model_only: Whether it holds no optimizer, and the live one is new.

        Returns:
            What was proved, and what differs and could not be repaired.
        """
        assert self._saved is not None
        model, optimizer, scheduler = self._live
        put_back_buffers(model, self._saved["buffers"])
        _put_back_gradients(model, self._saved["gradients"])
        saved = _whole(self._saved, checkpoint)
        if model_only:
            saved = {**saved, "optimizer": {}, "scheduler": {}, "scaler": {}}
        problems, repaired = self._prove_model(model, saved["model"], checkpoint)
        beside = _digests_beside(optimizer, scheduler)
        lost = differing(saved["optimizer"], beside["optimizer"])
        if lost:
            repair.optimizer_from_file(optimizer, checkpoint, lost)
            beside = _digests_beside(optimizer, scheduler)
            repaired += lost
        for kind in ("optimizer", "scheduler", "scaler"):
            problems += describe_differing(kind, differing(saved[kind], beside[kind]))
        problems = problems or unlike_rank_0(self._saved, self._of_model_and_optimizer, self._ranks.rank)
        kinds = {"model": "model tensors", "optimizer": "optimizer values", "scheduler": "scheduler values"}
        proof = Proof({label: len(saved[kind]) for kind, label in kinds.items()})
        proof["repaired"], proof.names = len(repaired), tuple(repaired)
        self._moment.resumed()
        return proof, problems

    def _prove_model(
        self, model: torch.nn.Module, saved: Mapping[str, str], checkpoint: Path
    ) -> tuple[list[str], list[str]]:
        """Returns the problems that are left, and the names of what was repaired."""
        # A parameter that the checkpoint knows by another name, if at all: training had tied it, or did not have it.
        new = [
            f"model: {name} is a parameter of its own here, and was not when it was saved"
            for name in _new(model, saved)
        ]
        lost = differing(saved, self._digests.of(model))
        if not lost:
            return new[:3], []
        present = module_tensors(model)
        cause = repair.model_from_checkpoint(model, checkpoint, [name for name in lost if name in present])
        still = differing(saved, self._digests.of(model))
        if not still:
            logger.warning("%s: Trainer had not loaded %d tensors; repaired from the checkpoint", checkpoint, len(lost))
        problems = new[:3] + describe_differing("model", still) + ([cause] if still and cause else [])
        return problems, [name for name in lost if name not in still]

    def after_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._moment.saved()

    def before_step(self, args: TrainingArguments, state: TrainerState) -> None:
        self._moment.begin_step(state.global_step)

    def before_save(self, args: TrainingArguments, state: TrainerState) -> None:
        self._buckets.begin_anew()  # as a resumed run does, which takes its first step after this
        self._moment.look(state.global_step)
        self._unlike = unlike_buffers(self._live[0], self._ranks, what=f"comparing buffers at step {state.global_step}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            return
        best = Path(state.best_model_checkpoint)
        file = rank_file(best, args.process_index)
        if not file.is_file():
            return  # saved by stock Trainer: there is no proof to hold it to
        model = self._live[0]
        kept = model.state_dict().keys()
        part = _whole(read_tree(file, kind=TRAINER)["parts"][self.key], best)
        if part["model"].keys() <= part["buffers"].keys():
            return  # Trainer saved another model, which nothing proves
        put_back_buffers(model, {name: buffer for name, buffer in part["buffers"].items() if name in kept})
        saved = {name: digest for name, digest in part["model"].items() if name in kept}
        problems, _ = self._prove_model(model, saved, best)
        if problems:
            raise ResumeMismatch(best, problems, "load_best_model_at_end did not give back the best weights")

    def release(self, args: TrainingArguments) -> None:
        self._moment.close()


def _put_back_gradients(model: torch.nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in saved:
            value = saved[name].to(parameter.device)
            parameter.grad = part_like(value, parameter)


def _new(model: torch.nn.Module, saved: Mapping[str, str]) -> list[str]:
    """The parameters of the model that the checkpoint has no digest of."""
    return [name for name, _ in model.named_parameters() if name not in saved]


def _whole(saved: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
    """The state that one rank saved, with rank 0's digests where it kept those of samples."""
    return whole_digests(saved, lambda: read_tree(rank_file(checkpoint, 0), kind=TRAINER)["parts"][Weights.key])


def _digests_beside(optimizer: Any, scheduler: Any, *, small: bool = False) -> dict[str, dict[str, str]]:
    """``small``: all but the optimizer's."""
    digests = beside_digests(None if small else optimizer, scheduler, getattr(optimizer, "scaler", None))
    if small:
        del digests["optimizer"]
    return digests
