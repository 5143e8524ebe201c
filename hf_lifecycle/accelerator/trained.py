"""What an accelerator trains: its models, optimizers, schedulers and scaler, their digests, and the proof of a load.

The digests are stored at a save. After accelerate has loaded, the live state must have the same: then what was restored
is what was saved. Put back beforehand are buffers that ``state_dict()`` leaves out and that training changed, and
values of an optimizer's state whose dtype its ``load_state_dict`` narrowed. Of what DeepSpeed and Megatron-LM hold in
their own engines, the schedulers alone are proved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType

from hf_lifecycle.checkpoint.torch_file import load_safely
from hf_lifecycle.ranks import Ranks
from hf_lifecycle.state.buffers import put_back_buffers, unlike_buffers, unsaved_buffer_digests
from hf_lifecycle.state.fingerprint import FrozenDigests, leaf_digests
from hf_lifecycle.state.proof import (
    Proof,
    describe_differing,
    differing,
    put_back_optimizer_values,
    unwrapped,
)

__all__ = ["Trained"]

_ENGINES = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
_SHARDED = (*_ENGINES, DistributedType.FSDP)


class Trained:
    """Digests at the save, proof at the load.

    Args:
        accelerator: Knows what it prepared.
        ranks: The processes of the training. Each saves the buffers that are not alike on all of them, such as
            BatchNorm's: accelerate's files have those of one.
    """

    def __init__(self, accelerator: Any, ranks: Ranks) -> None:
        self._accelerator = accelerator
        self._ranks = ranks
        self._digests: dict[str, FrozenDigests] = {}
        self._first_buffers: dict[str, dict[str, str]] = {}  # outside state_dict(), as training found them

    def _models(self) -> Iterator[tuple[str, torch.nn.Module]]:
        if self._accelerator.distributed_type not in _ENGINES:
            yield from (
                (_name("model", number), unwrapped(one)) for number, one in enumerate(self._accelerator._models)
            )

    def _optimizers(self) -> Iterator[tuple[str, Any]]:
        if self._accelerator.distributed_type not in _ENGINES:
            yield from ((_name("optimizer", number), one) for number, one in enumerate(self._accelerator._optimizers))

    def watch(self) -> None:
        """Remember the buffers that no file will hold, before training changes them."""
        for name, model in self._models():
            if name not in self._first_buffers:
                self._first_buffers[name] = unsaved_buffer_digests(model)

    def state_dict(self) -> dict[str, Any]:
        """The digests of everything that is trained, by kind and name, and the buffers that training changed."""
        self.watch()
        changed = {}
        for name, model in self._models():
            tensors, first = dict(model.named_buffers()), self._first_buffers[name]
            now = unsaved_buffer_digests(model)
            keys = [key for key in now if now[key] != first.get(key)]
            unlike = unlike_buffers(model, self._ranks, what=f"buffers of {name}")
            keys += [key for key in unlike if key not in keys]
            changed[name] = {key: tensors[key].detach().clone() for key in keys}
        return {**self._all_digests(), "buffers": changed}

    def _all_digests(self) -> dict[str, dict[str, str]]:
        model: dict[str, str] = {}
        for name, module in self._models():
            digests = self._digests.setdefault(name, FrozenDigests()).of(module)
            model |= {f"{name}.{key}": digest for key, digest in digests.items()}
        optimizer: dict[str, str] = {}
        for name, one in self._optimizers():
            optimizer |= leaf_digests(one.state_dict(), name)
        scheduler: dict[str, str] = {}
        for number, one in enumerate(self._accelerator._schedulers):
            scheduler |= leaf_digests(one.state_dict(), _name("scheduler", number))
        scaler = self._accelerator.scaler
        return {
            "model": model,
            "optimizer": optimizer,
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


def _name(kind: str, number: int) -> str:
    return f"{kind} {number}"
