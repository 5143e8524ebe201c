"""A captured save, completed later from a snapshot of its moment: its files, and its digests."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_lifecycle.engine.save_session import SaveSession
from hf_lifecycle.saving.captured import Captured
from hf_lifecycle.saving.files.checkpoint_files import Files
from hf_lifecycle.saving.snapshots.snapshot import Snapshot
from hf_lifecycle.state.fingerprint import Digests, digest_of, leaf_digests, tensor_digest, tensor_digests

__all__ = ["Deferred", "DeferredProof", "joined", "state_digests"]


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


@dataclass(slots=True, kw_only=True)
class Deferred(Captured, abc.ABC):
    """A captured save, whose files the host knows.

    Attributes:
        told: What :meth:`write` has returned.
    """

    told: Mapping[str, Any] = field(default_factory=dict)

    @abc.abstractmethod
    def write(self, files: Files, session: SaveSession) -> Mapping[str, Any]:
        """Write this rank's files beside what the host wrote itself. Returns what rank 0 has to know of them.

        Raises:
            OSError: A file could not be written.
        """

    def complete(self, folder: Path, told: Sequence[Mapping[str, Any]]) -> None:
        """Write what rests on the parts of all ranks, who ``told`` this; on rank 0, when they are written."""
