"""What an accelerator trains: its models, optimizers, schedulers and scaler, their digests, and the proof of a load.

The digests are stored at a save. After accelerate has loaded, the live state must have the same: then what was restored
is what was saved. Put back beforehand are buffers that ``state_dict()`` leaves out and that training changed, and
values of an optimizer's state whose dtype its ``load_state_dict`` narrowed. Of what DeepSpeed and Megatron-LM hold in
their own engines, the schedulers alone are proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from hf_lifecycle.accelerator.intercept import models_of, optimizers_of, schedulers_of
from hf_lifecycle.accelerator.prepared import ENGINES, model_name, optimizer_name, scheduler_name
from hf_lifecycle.checkpoint.files.additions import LOOP, rank_file
from hf_lifecycle.checkpoint.files.statefile import read_tree
from hf_lifecycle.checkpoint.files.torch_file import load_safely
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.saving.live import host_copy
from hf_lifecycle.saving.snapshot import Snapshot
from hf_lifecycle.state.buffers import put_back_buffers, unlike_buffers, unsaved_buffer_digests
from hf_lifecycle.state.fingerprint import FrozenDigests, digest_of, leaf_digests, module_tensors, tensor_digest
from hf_lifecycle.state.proof import (
    Proof,
    describe_differing,
    differing,
    put_back_optimizer_values,
    unwrapped,
)
from hf_lifecycle.state.replicas import is_replica, optimizer_samples, tensor_samples, unlike_rank_0, whole_digests

__all__ = ["DeferredTrained", "Trained"]

_SHARDED = (*ENGINES, DistributedType.FSDP.value)


@dataclass(frozen=True, slots=True)
class DeferredTrained:
    """What :meth:`Trained.state_dict` would have given at one moment, to be completed from a snapshot of that moment.

    Attributes:
        names: The models' tensors, in their order.
        frozen: The digests of those that need no gradient, or themselves; of use where they are not in the snapshot.
        beside: The digests of schedulers and scaler, and the buffers that training changed.
    """

    names: tuple[str, ...]
    frozen: Mapping[str, str | torch.Tensor]
    beside: Mapping[str, Any]

    def tree(self, snapshot: Snapshot, optimizers: Mapping[str, Any]) -> dict[str, Any]:
        """The state; ``optimizers``: the copy of each optimizer's state, by name."""
        model = {
            name: tensor_digest(snapshot.named(name)) if snapshot.has(name) else digest_of(self.frozen[name])
            for name in self.names
        }
        states = [leaf_digests(state, name) for name, state in optimizers.items()]
        return {"model": model, "optimizer": {key: one[key] for one in states for key in one}, **self.beside}


class Trained:
    """Digests at the save, proof at the load.

    Args:
        accelerator: Knows what it prepared.
        ranks: The processes of the training. Each saves the buffers that are not alike on all of them, such as
            BatchNorm's: accelerate's files have those of one.

    Attributes:
        digests: Those of the tensors of models and optimizers, by name, at the last save that accelerate made itself.
    """

    def __init__(self, accelerator: Any, ranks: Ranks) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self.digests: Mapping[str, str] = {}
        self._digests: dict[str, FrozenDigests] = {}
        self._first_buffers: dict[str, dict[str, str]] = {}  # outside state_dict(), as training found them

    def _models(self) -> Iterator[tuple[str, torch.nn.Module]]:
        if self._accelerator.distributed_type not in ENGINES:
            yield from ((model_name(number), unwrapped(one)) for number, one in enumerate(models_of(self._accelerator)))

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        if self._accelerator.distributed_type not in ENGINES:
            yield from ((optimizer_name(number), one) for number, one in enumerate(optimizers_of(self._accelerator)))

    def watch(self) -> None:
        """Remember the buffers that no file will hold, before training changes them."""
        for name, model in self._models():
            if name not in self._first_buffers:
                self._first_buffers[name] = unsaved_buffer_digests(model)

    def state_dict(self) -> dict[str, Any]:
        """The digests of everything that is trained, by kind and name, and the buffers that training changed."""
        digests = self._all_digests(replica=True)
        self.digests = digests["model"] | digests["optimizer"]
        return {**digests, "buffers": self._changed_buffers()}

    def defer(self) -> DeferredTrained:
        """Capture the state of this moment, but for what a snapshot of models and optimizers has."""
        names: list[str] = []
        frozen: dict[str, str | torch.Tensor] = {}
        for name, model in self._models():
            names += [f"{name}.{key}" for key in module_tensors(model)]
            known = self._digests.setdefault(name, FrozenDigests()).frozen(dict(model.named_parameters()))
            frozen |= {f"{name}.{key}": digest for key, digest in known.items()}
        return DeferredTrained(tuple(names), frozen, {**self._small_digests(), "buffers": self._changed_buffers()})

    def _changed_buffers(self) -> dict[str, dict[str, torch.Tensor]]:
        self.watch()
        changed = {}
        for name, model in self._models():
            tensors, first = dict(model.named_buffers()), self._first_buffers[name]
            now = unsaved_buffer_digests(model)
            keys = [key for key in now if now[key] != first.get(key)]
            unlike = unlike_buffers(model, self._ranks, what=f"buffers of {name}")
            keys += [key for key in unlike if key not in keys]
            changed[name] = {key: host_copy(tensors[key]) for key in keys}
        return changed

    def _all_digests(self, *, replica: bool = False) -> dict[str, dict[str, str]]:
        """``replica``: of samples only, where this rank trains a copy of what rank 0 trains."""
        model: dict[str, str] = {}
        models = dict(self._models())
        kind = self._accelerator.distributed_type
        replica = replica and bool(models) and all(is_replica(self._ranks, kind, one) for one in models.values())
        for name, module in models.items():
            known = self._digests.setdefault(name, FrozenDigests())
            digests = tensor_samples(module) if replica else known.of(module)
            model |= {f"{name}.{key}": digest for key, digest in digests.items()}
        optimizer: dict[str, str] = {}
        for name, one in self._optimizers():
            optimizer |= (optimizer_samples if replica else leaf_digests)(one.state_dict(), name)
        return {"model": model, "optimizer": optimizer, **self._small_digests()}

    def _small_digests(self) -> dict[str, dict[str, str]]:
        scheduler: dict[str, str] = {}
        for number, one in enumerate(schedulers_of(self._accelerator)):
            scheduler |= leaf_digests(one.state_dict(), scheduler_name(number))
        scaler = self._accelerator.scaler
        return {
            "scheduler": scheduler,
            "scaler": {} if scaler is None else leaf_digests(scaler.state_dict(), "scaler"),
        }

    def prove(self, saved: Mapping[str, Any], checkpoint: Path, *, resharded: bool = False) -> tuple[Proof, list[str]]:
        """Put back what accelerate's loading leaves out, and compare.

        Args:
            saved: What :meth:`state_dict` gave at the save.
            checkpoint: Its files.
            resharded: Whether other processes saved: parts of a sharded model are then others, and not compared.

        Returns:
            What was proved, and a sentence for each tensor or value that is not what was saved.
        """
        for name, model in self._models():
            put_back_buffers(model, saved["buffers"].get(name, {}))
            first = self._first_buffers.setdefault(name, unsaved_buffer_digests(model))
            for key in saved["buffers"].get(name, {}):  # the next save has to hold them again
                first.pop(key, None)
        own = saved
        saved = whole_digests(own, lambda: read_tree(rank_file(checkpoint, 0), kind=LOOP)["parts"]["weights"])
        live = self._all_digests()
        if resharded and self._accelerator.distributed_type in _SHARDED:
            saved = {**saved, "model": {}, "optimizer": {}}
        lost = differing(saved["optimizer"], live["optimizer"])
        if lost and self._accelerator.distributed_type not in _SHARDED:
            self._repair_optimizers(checkpoint, lost)
            live = self._all_digests()
        kinds = {"model": "model tensors", "optimizer": "optimizer values", "scheduler": "scheduler values"}
        problems = [
            problem
            for kind in (*kinds, "scaler")
            for problem in describe_differing(kind, differing(saved[kind], live[kind]))
        ]
        problems = problems or unlike_rank_0(own, lambda: self._all_digests(replica=True), self._ranks.rank)
        proof = Proof({label: len(saved[kind]) for kind, label in kinds.items()})
        still = set(differing(saved["optimizer"], live["optimizer"]))
        proof.names = tuple(name for name in lost if name not in still)
        proof["repaired"] = len(proof.names)
        return proof, problems

    def _repair_optimizers(self, checkpoint: Path, lost: list[str]) -> None:
        for number, (name, optimizer) in enumerate(self._optimizers()):
            own = [f"optimizer{key.removeprefix(name)}" for key in lost if key.startswith(f"{name}.")]
            file = checkpoint / ("optimizer.bin" if number == 0 else f"optimizer_{number}.bin")
            if own and file.is_file():
                with open(file, "rb") as opened:
                    put_back_optimizer_values(optimizer, load_safely(opened), own)
