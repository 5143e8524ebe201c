"""What a host loaded is what was saved: proved tensor by tensor, and where its loading loses some, restored first.

Digests of models, optimizers, schedulers and scaler are stored at a save, and the live state must have the same once
the host has loaded. Saved with them are buffers that ``state_dict()`` leaves out, where training changed them; buffers
that are not alike on all ranks, of which the host saves one rank's; and what else no file of the host's holds.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from hf_lifecycle.checkpoint.files.additions import rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.engine.deferred_proof import DeferredProof, joined, state_digests
from hf_lifecycle.engine.readable import unlike_groups, unlike_shapes, unlike_tensors
from hf_lifecycle.engine.resharding import SavedShards, is_sharded, obstacle_to_resharding
from hf_lifecycle.processes.ranks import Ranks
from hf_lifecycle.saving.snapshots.live import host_copy
from hf_lifecycle.state.fingerprint import (
    FrozenDigests,
    digests_on_cores,
    module_tensors,
    quick_digests,
)
from hf_lifecycle.state.proof import (
    Proof,
    by_address,
    describe_differing,
    differing,
    put_back_keys,
    put_back_optimizer_values,
)
from hf_lifecycle.state.replicas import (
    is_replica,
    optimizer_samples,
    put_back_buffers,
    tensor_samples,
    unlike_buffers,
    unlike_rank_0,
    unsaved_buffer_digests,
    whole_digests,
)

__all__ = ["LoadProof", "Repair", "Trained"]

logger = logging.getLogger("hf_lifecycle")

PART = "weights"  # of a rank's file

Repair = Callable[[list[str]], str | None]  # puts back the tensors of these names, or says why it cannot
T = TypeVar("T")


class Trained(NamedTuple):
    """What is trained, without a host's wrappers.

    Attributes:
        models: By what the names of their tensors begin with.
        distributed_type: Accelerate's.
    """

    models: Mapping[str, torch.nn.Module]
    optimizers: Mapping[str, Any]
    schedulers: Mapping[str, Any]
    scaler: Any = None
    distributed_type: Any = None


class LoadProof:
    """Digests at the save, proof at the load.

    Args:
        kind: The kind of the host's files.

    Attributes:
        digests: Those of the tensors of models and optimizers, by name, at the last save that the host made itself.
    """

    def __init__(self, ranks: Ranks, kind: str, trained: Callable[[], Trained]) -> None:
        self.digests: Mapping[str, str] = {}
        self._ranks = ranks
        self._kind = kind
        self._trained = trained
        self._known = FrozenDigests()
        self._watched: set[str] = set()  # models
        self._first: dict[str, str] = {}  # buffers outside state_dict(), as training found them
        self._unlike: list[str] = []  # the buffers that are not alike on all ranks, at the save under way
        self._kept: dict[str, bool] = {}  # the buffers, and whether state_dict() has them
        self._told: set[str] = set()

    def watch(self) -> None:
        """Remember the buffers that no file will hold, before training changes them."""
        new = {name: model for name, model in self._trained().models.items() if name not in self._watched}
        self._watched |= new.keys()
        self._first |= _named(new, unsaved_buffer_digests)

    def begin_save(self, what: str) -> None:
        """A save begins, on every rank; ``what`` is said of a rank that does not come."""
        self.watch()
        models = self._trained().models
        self._unlike = list(_named(models, lambda one: dict.fromkeys(unlike_buffers(one, self._ranks, what=what))))
        for name in (f"{key}.{one}" for key, each in self._trained().optimizers.items() for one in by_address(each)):
            if name not in self._told:
                self._told.add(name)
                logger.warning(
                    "not exact: %s is kept by the id() or the address of parameters, which are others in a resumed "
                    "run: keep it by the parameters themselves, or in optimizer.state",
                    name,
                )

    def state_dict(self, unfiled: Collection[str] = ()) -> dict[str, Any]:
        """The digests of everything that is trained, by kind and name, and tensors that no file of the host's holds.

        Args:
            unfiled: Names of more of these.
        """
        models = self._trained().models
        if self._is_replica():
            both = self._replica_digests()
        else:
            both = {"model": self._model_digests(), "optimizer": self._optimizer_digests()}
        self.digests = both["model"] | both["optimizer"]
        unsaved, tensors = _named(models, unsaved_buffer_digests), _named(models, module_tensors)
        changed = [name for name, digest in unsaved.items() if digest != self._first.get(name)]
        names = dict.fromkeys((*changed, *self._unlike, *unfiled))
        return {**both, "buffers": {name: host_copy(tensors[name]) for name in names}, **self._small_digests()}

    def defer(
        self, live: Mapping[str, Mapping[str, torch.Tensor]], unfiled: Collection[str] = (), **beside: Any
    ) -> DeferredProof:
        """Capture the state of this moment, but for what a snapshot of models and optimizers has.

        Args:
            live: The parameters and buffers of each model, by each of their names.
            beside: What the host adds.
        """
        names: list[str] = []
        parameters: dict[str, torch.nn.Parameter] = {}
        for prefix, tensors in live.items():
            first = {id(tensor): name for name, tensor in reversed(list(tensors.items()))}
            named = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if first[id(tensor)] == name}
            own = {name: one for name, one in named.items() if isinstance(one, torch.nn.Parameter)}
            parameters |= own
            names += [*own, *(name for name in named if name not in own)]
        buffers = [name for name in names if name not in parameters]
        if buffers != list(self._kept):  # which are kept is asked once: a state_dict() takes its time
            state = _named(self._trained().models, lambda one: one.state_dict())
            self._kept = {name: name in state for name in buffers}
        return DeferredProof(
            names=tuple(names),
            frozen=self._known.frozen(parameters),
            unsaved={name: self._first.get(name) for name, kept in self._kept.items() if not kept},
            unfiled=(*self._unlike, *unfiled),
            beside={**self._small_digests(), **beside},
        )

    # Digests

    def quick_digests(self) -> dict[str, dict[str, str]]:
        """What :meth:`state_dict` tells of all that is trained, for a comparison a moment later."""
        model = quick_digests(_named(self._trained().models, module_tensors))
        optimizer = state_digests(_states(self._trained().optimizers), quick_digests)
        return {"model": model, "optimizer": optimizer, **self._small_digests()}

    def _is_replica(self) -> bool:
        trained = self._trained()
        each = [is_replica(self._ranks, trained.distributed_type, one) for one in trained.models.values()]
        return bool(each) and all(each)

    def _replica_digests(self) -> dict[str, dict[str, str]]:
        """Of samples only, where this rank trains a copy of what rank 0 trains."""
        trained = self._trained()
        samples = [optimizer_samples(one.state_dict(), name) for name, one in trained.optimizers.items()]
        return {"model": _named(trained.models, tensor_samples), "optimizer": joined(samples)}

    def _model_digests(self, shards: SavedShards | None = None) -> dict[str, str]:
        tensors = _named(self._trained().models, module_tensors)
        return self._known.of(tensors) if shards is None else dict(shards.of("model")(tensors))

    def _optimizer_digests(self, shards: SavedShards | None = None) -> dict[str, str]:
        of_tensors = digests_on_cores if shards is None else shards.of("optimizer")
        return state_digests(_states(self._trained().optimizers), of_tensors)

    def _small_digests(self) -> dict[str, dict[str, str]]:
        trained = self._trained()
        scaler = {} if trained.scaler is None else {"scaler": trained.scaler}
        return {"scheduler": state_digests(_states(trained.schedulers)), "scaler": state_digests(_states(scaler))}

    # Proof

    def prove(
        self,
        saved: Mapping[str, Any],
        checkpoint: Path,
        *,
        left_out: Collection[str] = (),
        repair: Repair | None = None,
        optimizer_files: Mapping[str, Path] | None = None,
        saved_by: int | None = None,
    ) -> tuple[Proof, list[str]]:
        """Put back what the host's loading leaves out, and compare.

        Args:
            saved: What :meth:`state_dict` gave at the save.
            left_out: The kinds that nothing is to be held to.
            repair: Puts back tensors of models that are not what was saved.
            optimizer_files: Where each optimizer's state is, with values whose dtype ``load_state_dict`` narrows.
            saved_by: How many processes saved.

        Returns:
            What was proved, and a sentence for each tensor or value that is not what was saved.
        """
        for prefix, model in self._trained().models.items():
            own = [name for name in saved["buffers"] if name.startswith(prefix)]
            put_back_buffers(model, {name.removeprefix(prefix): saved["buffers"][name] for name in own})
        self.watch()
        for name in saved["buffers"]:  # the next save has to hold them again
            self._first.pop(name, None)
        whole = {**self.whole(saved, checkpoint), **{kind: {} for kind in left_out}}
        shards = self.shards_of(checkpoint, saved_by, saved)
        held = ([], []) if "model" in left_out else self.prove_model(whole["model"], checkpoint, repair, shards)
        problems, repaired = held
        for optimizer in self._trained().optimizers.values() if whole["optimizer"] else ():
            problems += put_back_keys(optimizer)
        lost = differing(whole["optimizer"], self._optimizer_digests(shards) if whole["optimizer"] else {})
        if lost and optimizer_files and shards is None:
            self._repair_optimizers(optimizer_files, lost)
            still = differing(whole["optimizer"], self._optimizer_digests())
            repaired += [name for name in lost if name not in still]
            lost = still
        problems += describe_differing("optimizer", lost)
        for kind, digests in self._small_digests().items():
            problems += describe_differing(kind, differing(whole[kind], digests))
        problems = problems or unlike_rank_0(saved, self._replica_digests, self._ranks.rank)
        kinds = {"model": "model tensors", "optimizer": "optimizer values", "scheduler": "scheduler values"}
        proof = Proof({label: len(whole[kind]) for kind, label in kinds.items()})
        proof["gathered from shards"] = 0 if shards is None else shards.gathered
        proof["repaired"], proof.names = len(repaired), tuple(repaired)
        return proof, problems

    def unlike(self, saved: Mapping[str, Any], files: Mapping[str, Path]) -> tuple[list[str], list[str]]:
        """What models, and what optimizers, differ in from those that were ``saved``; seen before anything is loaded.

        Args:
            files: Where the tensors of each model are, if in one file.
        """
        models = self._trained().models
        shapes = [unlike_shapes(model, files[name], name) for name, model in models.items() if name in files]
        tensors = [*unlike_tensors(models, saved["model"]), *(one for each in shapes for one in each)]
        return tensors, unlike_groups(self._trained().optimizers, saved["optimizer"])

    def obstacle_to_resharding(self) -> str | None:
        """Why what other ranks saved cannot be verified; None where it can."""
        trained = self._trained()
        return obstacle_to_resharding(trained.models.values(), self._ranks.world_size, trained.distributed_type)

    def shards_of(self, checkpoint: Path, saved_by: int | None, saved: Mapping[str, Any]) -> SavedShards | None:
        """What the parts of sharded models are compared with; None where no other ranks had other parts.

        Args:
            saved: What one of them stored.

        Raises:
            StateFileError, FileNotFoundError, RankFailed: As :class:`SavedShards` does.
        """
        if saved_by is None or saved_by == self._ranks.world_size or not is_sharded(self._trained().models.values()):
            return None
        return SavedShards(self._ranks, checkpoint, self._kind, PART, saved_by=saved_by, given=saved)

    def whole(self, saved: Mapping[str, Any], checkpoint: Path) -> Mapping[str, Any]:
        """The state that one rank saved, with rank 0's digests where it kept those of samples."""
        return whole_digests(saved, lambda: read_tree(rank_file(checkpoint, 0), kind=self._kind)["parts"][PART])

    def prove_model(
        self, saved: Mapping[str, str], checkpoint: Path, repair: Repair | None, shards: SavedShards | None = None
    ) -> tuple[list[str], list[str]]:
        """Hold the models to these digests. Returns the problems that are left, and the names of what was repaired.

        Nothing is repaired of ``shards``: other ranks may have found no problem, and do not gather once more.
        """
        parameters = _named(self._trained().models, lambda one: dict(one.named_parameters()))
        # A parameter that the checkpoint knows by another name, if at all: training had tied it, or did not have it.
        problems = [
            f"model: {name} is a separate parameter now, and was tied to another one when it was saved"
            for name in parameters
            if name not in saved
        ][:3]
        lost = still = differing(saved, self._model_digests(shards))
        cause = None
        if lost and repair is not None and shards is None:
            cause = repair(lost)
            still = differing(saved, self._model_digests())
            if not still:
                logger.warning(
                    "%s: %d tensors had not been loaded; they are repaired from the checkpoint", checkpoint, len(lost)
                )
        problems += describe_differing("model", still) + ([cause] if still and cause else [])
        return problems, [name for name in lost if name not in still]

    def _repair_optimizers(self, files: Mapping[str, Path], lost: list[str]) -> None:
        for name, optimizer in self._trained().optimizers.items():
            own = [key for key in lost if key.startswith(f"{name}.")]
            if own and files[name].is_file():
                with open(files[name], "rb") as opened:
                    put_back_optimizer_values(optimizer, load_safely(opened), own)


def _named(models: Mapping[str, torch.nn.Module], of: Callable[[torch.nn.Module], Mapping[str, T]]) -> dict[str, T]:
    """What ``of`` gives of each model, under names that begin with what the model's do."""
    return {f"{prefix}{name}": one for prefix, model in models.items() for name, one in of(model).items()}


def _states(owners: Mapping[str, Any]) -> dict[str, Any]:
    return {name: one.state_dict() for name, one in owners.items()}
