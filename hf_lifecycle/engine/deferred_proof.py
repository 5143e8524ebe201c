"""Digests of a save that is completed later, from a snapshot of its moment."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.fingerprint import Digests, digest_of, leaf_digests, tensor_digest, tensor_digests

__all__ = ["DeferredProof", "joined", "state_digests"]


@dataclass(frozen=True, slots=True)
class DeferredProof:
    """What ``LoadProof.state_dict`` would have given at one moment, to be completed from a snapshot of that moment.

    Attributes:
        names: The models' parameters and buffers.
        frozen: The digests of those that need no gradient, or themselves; of use where they are not in the snapshot.
        unsaved: The buffers that ``state_dict()`` leaves out, with the digest that training found them with.
        unfiled: What else no file of the host's holds.
    """

    names: tuple[str, ...]
    frozen: Mapping[str, str | torch.Tensor]
    unsaved: Mapping[str, str | None]
    unfiled: Sequence[str]
    beside: Mapping[str, Any]

    def tree(self, snapshot: Snapshot, optimizers: Mapping[str, Any]) -> dict[str, Any]:
        """The state, with the digests of the tensors in the snapshot; ``optimizers``: the copy of each one's state."""
        digests = {
            name: tensor_digest(snapshot.named(name)) if snapshot.has(name) else digest_of(self.frozen[name])
            for name in self.names
        }
        changed = [name for name, digest in self.unsaved.items() if digest != digests[name]]
        return {
            "model": digests,
            "optimizer": state_digests(optimizers),
            "buffers": {name: snapshot.named(name).clone() for name in dict.fromkeys((*changed, *self.unfiled))},
            **self.beside,
        }


def state_digests(states: Mapping[str, Any], of_tensors: Digests = tensor_digests) -> dict[str, str]:
    """The digests of every leaf of these states, by the name of each."""
    return joined(leaf_digests(state, name, of_tensors=of_tensors) for name, state in states.items())


def joined(digests: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """All of these in one."""
    return {key: digest for one in digests for key, digest in one.items()}
